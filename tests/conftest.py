import pytest

import build_dataset
import train_tokenizer


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """Folder with data/ and tokenizer/, made of the embedded sample by the scripts themselves."""
    folder = tmp_path_factory.mktemp("sample")
    data, tokenizer = str(folder / "data"), str(folder / "tokenizer")
    build_dataset.main(["--sample", "--validation_fraction", "0.1", "--output_dir", data])
    train_tokenizer.main(["--data_dir", data, "--output_dir", tokenizer, "--vocab_size", "1024"])
    return folder
