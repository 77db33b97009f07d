#!/usr/bin/env bash
# The whole experiment, top to bottom, on one machine:
#
#     screen -L -dmS run bash runner.sh     the published experiment: data, tokenizer, both models, report
#     bash runner.sh --seeds 3              three pairs of models, seeds 42 to 44, so that the report has intervals
#     bash runner.sh --seeds 3 --parallel 2 two of their trainings at a time, with a log each in results/logs/
#     bash runner.sh --recipe small --parallel 2 --from_files 'texts/*.gz'
#                                           another experiment from recipes/, with your own text
#     bash runner.sh -- --bf16              flags after -- are passed to every training (python train_model.py --help)
#     bash runner.sh --test_pipeline        the same stages with tiny numbers, on the embedded sample, in scratch/
#     bash runner.sh --tests [pytest flags] the tests
#     bash runner.sh --benchmark            the CUDA tests if there is a GPU, and all benchmarks, into benchmark/
#
# Creates a virtual environment in .venv; with --no_venv it uses the current Python, unchanged.
# After an interruption the same command continues: a stage that has a complete result is not repeated. Pushes
# data and models to the Hub when HUGGINGFACE_TOKEN and HUGGINGFACE_USER are set, in the environment or in .env (see
# .env.example); what the Hub already has is not sent again.

set -euo pipefail
cd "$(dirname "$0")"
export ESPERBERTO_ENDS_WITH=$$ # a stage ends when this script was killed (command.py)

usage() {
    echo "error: $1 (recipes: $(ls recipes | sed 's/\.sh$//' | paste -sd ' ' -); all flags: bash runner.sh --help)" >&2
    exit 2
}

mode=experiment
recipe=
texts=
wanted_seeds=
parallel=1
flags=()
behind= # whether there are flags behind --
venv=yes
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help)
            sed -n '2,/^$/s/^# \{0,1\}//p' runner.sh
            exit
            ;;
        --*=*) # --seeds=3
            key=${1%%=*} value=${1#*=}
            shift
            set -- "$key" "$value" "$@"
            continue
            ;;
        --)
            shift
            flags=("$@")
            behind=yes
            break
            ;;
        --tests)
            [ "$mode$recipe$wanted_seeds$texts$parallel" = experiment1 ] || usage "--tests goes with no other flag before it"
            mode=tests
            shift
            break # the other flags are for pytest
            ;;
        --benchmark) mode=benchmark ;;
        --no_venv) venv= ;;
        --test_pipeline | --recipe)
            if [ "$1" = --recipe ]; then shift; wanted=${1:-}; else wanted=test_pipeline; fi
            case "$wanted" in "" | *[!a-z0-9_]*) usage "--recipe needs the name of a file in recipes/" ;; esac
            [ -f "recipes/$wanted.sh" ] || usage "no recipe $wanted"
            [ -z "$recipe" ] || usage "two recipes: $recipe and $wanted"
            recipe=$wanted
            ;;
        --from_files)
            [ -n "${2:-}" ] || usage "--from_files needs a pattern, in quotes: 'texts/*.gz'"
            texts=$2
            shift
            ;;
        --seeds | --parallel)
            case "${2:-}" in "" | 0* | *[!0-9]*) usage "$1 needs a whole number above 0" ;; esac
            if [ "$1" = --seeds ]; then wanted_seeds=$2; else parallel=$2; fi
            shift
            ;;
        *) usage "unknown argument: ${1:-an empty one}" ;;
    esac
    shift
done
[ "$mode" != benchmark ] || [ "$recipe$wanted_seeds$texts$parallel$behind" = 1 ] ||
    usage "--benchmark goes with no other flag"

# ------------------------------------------------------------------------------------------------- environment
if [ -z "$venv" ]; then
    python() { "${PYTHON:-python3}" "$@"; }
    lacking=$(python - <<'EOF'
import importlib.metadata as metadata

missing = []
for line in open("requirements.txt").read().partition("# Only for")[0].splitlines():
    name = line.partition("==")[0]
    try:
        line.startswith("#") or metadata.version(name)
    except metadata.PackageNotFoundError:
        missing.append(name)
print(", ".join(dict.fromkeys(missing)))
EOF
    ) || { echo "error: no ${PYTHON:-python3} here that runs: set PYTHON" >&2; exit 1; }
    [ -z "$lacking" ] ||
        { echo "error: ${PYTHON:-python3} lacks $lacking: install what is missing, or leave out --no_venv" >&2; exit 1; }
else
    if ! cmp -s requirements.txt .venv/requirements.txt; then # missing, incomplete, or made from other requirements
        base=${PYTHON:-python3}
        command -v "$base" >/dev/null || { echo "error: no $base here: install Python 3.10 to 3.13, or set PYTHON" >&2; exit 1; }
        "$base" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' ||
            { echo "error: $("$base" --version) cannot run this: install Python 3.10 to 3.13, or set PYTHON" >&2; exit 1; }
        echo "== Installing requirements.txt into .venv"
        "$base" -m venv .venv || { echo "error: no virtual environment: install Python's venv module" >&2; exit 1; }
        .venv/bin/python -m pip install --quiet --requirement requirements.txt ||
            { echo "error: the requirements did not install: see above, then run this again" >&2; exit 1; }
        cp requirements.txt .venv/
    fi
    export PATH="$PWD/.venv/bin:$PATH"
fi

if [ "$mode" = tests ]; then
    python -m pytest tests -n 2 --dist loadfile "$@" # two files at a time; with --pdb, give -n 0 too
    exit
fi

# ------------------------------------------------------------------------------------------------- Hub
echo "== Hub"
pushing=
unpushed=
status=0
python hub.py check --optional || status=$? # now, not after hours of work
case $status in
    0) pushing=yes ;;
    3) ;; # token and user are not both set
    *) exit 1 ;;
esac

push() { # after a failed push the other stages still run, and the next run of this script pushes again
    if [ "$pushing" ]; then
        echo "== Push of $1"
        status=0
        python hub.py push "$1" || status=$?
        [ $status -ne 130 ] || exit 130 # Ctrl-C is meant for the whole script
        [ $status -eq 0 ] || unpushed=yes
    fi
}

# ------------------------------------------------------------------------------------------------- recipe
recipe=${recipe:-published}
. "recipes/$recipe.sh"
seeds=${wanted_seeds:-$seeds}
if [ -n "$texts" ]; then
    dataset=(${dataset[@]+"${dataset[@]}"} --from_files "$texts")
fi
if [ "$recipe" = test_pipeline ] && [ -f $work/results/report.md ]; then
    rm -rf $work # the last test run is complete: start a new one
fi

if [ "$mode" = benchmark ]; then # with the text of the experiment if it is there, otherwise with the sample
    mkdir -p benchmark
    python -m pytest tests -m cuda 2>&1 | tee benchmark/cuda_tests.txt
    if [ ! -f data/manifest.json ] || [ ! -f tokenizer/manifest.json ]; then
        work=scratch/benchmark
        [ -f $work/data/manifest.json ] || python build_dataset.py --sample --output_dir $work/data
        [ -f $work/tokenizer/manifest.json ] ||
            python train_tokenizer.py --data_dir $work/data --output_dir $work/tokenizer
    fi
    for what in step attention tokenize; do
        echo "== Benchmark: $what"
        python benchmark.py $what --data_dir $work/data --tokenizer_dir $work/tokenizer
    done
    exit
fi

# ------------------------------------------------------------------------------------------------- the experiment
# Every stage is called each time, and keeps a complete result that was made with the same flags.
stage() { echo "== $(date +%H:%M) Stage $1 of 4: $2"; }

stage 1 dataset
python build_dataset.py --keep --output_dir $work/data ${dataset[@]+"${dataset[@]}"}
push $work/data

stage 2 tokenizer
python train_tokenizer.py --keep --data_dir $work/data --output_dir $work/tokenizer ${tokenizer[@]+"${tokenizer[@]}"}

stage 3 training
status=0
python train_runs.py --softmax_n $softmax_n ${controls:+--controls $controls} \
    --seeds $(seq $first_seed $((first_seed + seeds - 1))) --parallel "$parallel" ${pushing:+--push} \
    --results_dir $work/results --output_dir "$work/models/<run>" -- \
    --data_dir $work/data --tokenizer_dir $work/tokenizer ${training[@]+"${training[@]}"} \
    ${flags[@]+"${flags[@]}"} || status=$?
case $status in
    0) ;;
    4) unpushed=yes ;;
    *) exit $status ;;
esac

stage 4 analysis
report=$work/results/report.md
sums=$work/results/analysed.txt # checksums of the results in the report; file times are wrong if the clock was set back
results=$(cksum $work/results/esperberto-*.json)
if [ -f $report ] && [ -f $sums ] && [ "$results" = "$(cat $sums)" ]; then
    echo "$report: found and kept, the results are the same"
else
    python analyze_kurtosis.py --models_dir $work/models --results_dir $work/results --data_dir $work/data \
        ${analysis[@]+"${analysis[@]}"}
    echo "$results" > $sums
fi

if [ "$unpushed" ]; then
    echo "error: not everything is on the Hub (see above): everything is saved in $work, run this again to push it" >&2
    exit 1
fi
echo "== $(date +%H:%M) Done: read $report. ${pushing:+Data, tokenizer and models are on the Hub.}"
