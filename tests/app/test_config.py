"""The configuration: what it accepts, what it refuses and in which words, and the README's table of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tiny_models import build

from actors.settings import GroupSettings
from app.config import AppConfig, load, table, validated

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build("mixtral", tmp_path_factory.mktemp("models")))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"data_paralel_size": 2}, ["data_paralel_size=2", "no such setting"]),
        ({"dtype": "int3"}, ["dtype='int3'", "float32"]),
        ({"data_parallel_size": 0}, ["data_parallel_size=0", "greater than or equal to 1"]),
        ({"tensor_parallel_size": 2}, ["tensor_parallel_size=2", "set it to 1"]),
        ({"data_parallel_size": 5, "max_data_parallel_size": 4}, ["data_parallel_size=5", "max_data_parallel_size=4"]),
        ({"min_data_parallel_size": 3, "max_data_parallel_size": 2}, ["max_data_parallel_size=2", "swap or widen"]),
        ({"data_parallel_size": 2, "data_parallel_size_local": 3}, ["data_parallel_size_local=3", "lower the first"]),
        ({"kv_blocks": 8, "memory_fraction": 0.5}, ["kv_blocks=8", "memory_fraction=0.5", "keep one"]),
        ({"kv_blocks": 2, "max_model_len": 64}, ["kv_blocks=2", "max_model_len=64", "raise kv_blocks to 4"]),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 32}, ["max_num_batched_tokens=32", "max_num_seqs=64"]),
        ({"device": "cuda", "max_num_batched_tokens": 128}, ["max_num_batched_tokens=128", "max_num_seqs=256"]),
        ({"max_model_len": 10**6}, ["max_model_len=1000000", "positions"]),
        ({"model": "no/such/place"}, ["no/such/place", "config.json"]),
        ({"device": "cuda", "cpus_per_rank": 2}, ["cpus_per_rank=2", "leave it out"]),
        ({"load_format": "gguf"}, ["load_format='gguf'", "dummy"]),
        ({"seed": 3}, ["seed=3", "set load_format to dummy"]),
        ({"cuda_graphs": [1, 2]}, ["cuda_graphs=[1, 2]", "leave it out on cpu"]),
        ({"device": "cuda", "cuda_graphs": [1, 512]}, ["cuda_graphs=[1, 512]", "max_num_seqs=256", "drop it"]),
        ({"device": "cuda", "cuda_graphs": [0]}, ["cuda_graphs.0=0"]),
        ({"pack_strategy": "strict"}, ["data_parallel_size_local", "strict"]),
        ({"http": {"max_n": 0}}, ["http.max_n=0"]),
    ],
)
def test_a_refusal_names_field_value_and_fix(checkpoint: str, wrong: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ValueError) as refused:
        validated({"model": checkpoint} | wrong)
    for words in named:
        assert words in str(refused.value)


def test_a_checkpoint_quantized_in_a_way_that_no_rank_can_load_is_refused(checkpoint: str, tmp_path: Path) -> None:
    config = json.loads(Path(checkpoint, "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ValueError, match=r"quant_method='awq'.*can be served"):
        validated({"model": str(tmp_path)})


def test_all_complaints_come_at_once(checkpoint: str) -> None:
    with pytest.raises(ValueError, match=r"(?s)block_size=0.*max_num_seqs=0"):
        validated({"model": checkpoint, "block_size": 0, "max_num_seqs": 0})


def test_group_settings_survive_the_way_through_serve(checkpoint: str) -> None:
    """Serve shows and stores an actor's arguments as JSON."""
    settings = AppConfig(model=checkpoint, nodes=("rack=a",), env_prefixes=("X_",)).group_settings()
    assert msgspec.convert(msgspec.json.decode(msgspec.json.encode(settings)), GroupSettings) == settings


def test_a_serve_file_gives_the_configuration_with_user_config_over_args(checkpoint: str, tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(
        f"applications:\n- name: a\n  args: {{model: {checkpoint}, data_parallel_size: 1}}\n"
        "  deployments:\n  - name: Ingress\n    user_config: {data_parallel_size: 3}\n"
    )
    assert load(path).data_parallel_size == 3
    with pytest.raises(ValueError, match="asked for 'b'"):
        load(path, "b")
    path.write_text("proxies: 1")
    with pytest.raises(ValueError, match="no `applications`"):
        load(path)


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_the_files_that_come_along_are_good(path: Path, checkpoint: str, tmp_path: Path) -> None:
    """But for the model, which is not part of the repository."""
    config = json.loads(Path(checkpoint, "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40960}))
    text, places = re.subn(r"(?m)^( +model:) .*$", rf"\1 {tmp_path}", path.read_text())
    assert places == 1
    (tmp_path / "serve.yaml").write_text(text)
    config = load(tmp_path / "serve.yaml")
    assert config.engine_config().max_num_batched_tokens >= config.step_seqs


def test_the_readme_has_the_table_of_today() -> None:
    assert table() in (ROOT / "README.md").read_text()


def test_building_the_application_takes_no_torch(checkpoint):
    """Serve builds it anew for each deploy, in a process of its own beside the ranks that serve."""
    code = (
        "import sys; from app.deployment import build_app; "
        f"build_app({{'model': {checkpoint!r}, 'device': 'cpu'}}); "
        "print({'torch', 'transformers', 'numba'} & set(sys.modules))"
    )
    built = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert built.stdout.strip() == "set()", built.stdout + built.stderr


def test_positions_that_a_config_leaves_to_its_family(checkpoint, tmp_path):
    document = json.loads(Path(checkpoint, "config.json").read_text())
    del document["max_position_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert validated({"model": str(tmp_path), "device": "cpu"}).context_length == 131072  # of every Mixtral
