import shutil
from pathlib import Path

from model.artifact.code_size import SOURCES, code_bytes

ROOT = Path(__file__).parents[2]


def test_counted_code_is_the_python_source_alone(tmp_path):
    for package in SOURCES:
        shutil.copytree(ROOT / package, tmp_path / package)
    expected = code_bytes(tmp_path)
    (tmp_path / "README.md").write_text("not counted")
    (tmp_path / "model" / "weights.bin").write_bytes(bytes(1000))
    (tmp_path / "model" / "network" / "gpt.py").touch()
    assert code_bytes(tmp_path) == expected
    assert expected == code_bytes(tmp_path)
    (tmp_path / "model" / "new.py").write_text("counted = 'whatever it is, it takes some bytes'\n")
    assert code_bytes(tmp_path) > expected
    assert 10_000 < expected < 400_000
