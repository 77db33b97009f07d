# The small experiment once more, on one GPU, with new seeds: does the answer hold on other hardware, and what does the
# interval of its five pairs leave open? Everything but the seeds and the machine is recipes/small.sh: the text, the
# model, the steps, float32, the primary metric and arm. Fixed before any of its runs was started:
#
#   seeds             48 to 63, all pairs that the machine's time allows, in this order
#   interval          of these seeds alone; the five pairs of small.sh are not added to it
#   batch of analysis 128 texts instead of 16, for speed: the sums are the same but for rounding

. recipes/small.sh
work=replication
analysis=(--max_samples 2000 --max_scored 2000 --batch_size 128)
softmax_n="0 1"
controls=
first_seed=48
seeds=16
