"""The tables of EsperBERTo (2023), beside which ours are printed, and the parameters and modules of their rows."""

# Mean ± population standard deviation over its 6 layers; activations in train mode with padding.
# (label, name behind `layer.<i>.`, published softmax0, published softmax1)
PUBLISHED = ["published softmax0", "published softmax1"]
WEIGHTS = [
    ("dense weight", "attention.output.dense.weight", "0.031 ± 0.021", "0.040 ± 0.027"),
    ("dense bias", "attention.output.dense.bias", "0.6 ± 1.1", "1.4 ± 1.4"),
    ("LayerNorm weight", "attention.output.LayerNorm.weight", "6.8 ± 3.9", "4.4 ± 2.9"),
    ("LayerNorm bias", "attention.output.LayerNorm.bias", "0.5 ± 0.8", "1.9 ± 2.3"),
]
ACTIVATIONS = [
    ("dense", "attention.output.dense", "0.74 ± 0.29", "1.96 ± 1.58"),
    ("dropout", "attention.output.dropout", "1.15 ± 0.32", "2.51 ± 1.76"),
    ("output (LayerNorm)", "attention.output", "0.77 ± 1.35", "0.90 ± 1.31"),
]
# The FFN output layer by layer, then mean ± deviation: the published table leaves it out, its result files hold it.
PUBLISHED_FFN = [
    ["6.0", "8.3", "20.6", "78.3", "100.1", "4.5", "36.3 ± 38.3"],
    ["26.0", "10.7", "11.4", "7.3", "0.3", "0.7", "9.4 ± 8.6"],
]
