# The published experiment (EsperBERTo, 2023): every default of the scripts, in the project's own folder.

work=.          # data/, tokenizer/, models/ and results/ lie in it
dataset=()      # flags of build_dataset.py
tokenizer=()    # of train_tokenizer.py
training=()     # of train_model.py
analysis=()     # of analyze_kurtosis.py
softmax_n="0 1" # the arms
controls=""     # published remedies that are trained beside them
first_seed=42
seeds=1
