# What bfloat16 costs: the first five pairs of the replication once more, trained with --bf16, on the same GPU. Measured
# in float32, as the others are. Fixed before any of its runs was started:
#
#   comparison        each run with the float32 run of the same arm and seed: held-out loss and every headline metric,
#                     mean of the five differences with its 95 % interval, for each arm alone
#   rule              a recipe may use bfloat16 if, in both arms, the interval of the primary metric's difference lies
#                     within the margin of 0.01 nats, and that of the held-out loss within 0.1 nats

. recipes/replication.sh
work=bfloat16
training+=(--bf16)
seeds=5
