# The whole path with tiny numbers, on the small corpus that comes with the project: what it shows is that it works.

work=scratch
dataset=(--sample --validation_fraction 0.1)
tokenizer=(--vocab_size 2048)
training=(
    --test_pipeline
    --config_overrides num_hidden_layers=2,hidden_size=128,num_attention_heads=4,intermediate_size=512
)
analysis=(--max_samples 8 --calibration_batches 1)
softmax_n="0 1 learned"
controls=""
first_seed=42
seeds=1
