# The other arms of the small experiment on one GPU, beside the first five pairs of the replication: is n = 1 special,
# do learned sinks and the two published remedies do the same? Exploratory: no question is decided by these runs alone.
# Fixed before any of its runs was started:
#
#   arms              n = 0.1, n = 10, learned sinks (n = 1 at the start), clipped softmax, gated attention
#   seeds             48 to 52, paired with the softmax0 and softmax1 runs of recipes/replication.sh, which are the same
#                     but for the arm, and are not trained again where their results are there

. recipes/replication.sh
softmax_n="0 1 0.1 10 learned"
controls="clipped gated"
seeds=5
