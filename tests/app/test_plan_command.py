"""``accordion plan`` on a saved cluster. On a live one: tests/placement/test_groups.py."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from app.cli import main
from placement.snapshot import Node, Snapshot


@pytest.fixture
def saved(tmp_path: Path) -> str:
    """A head without GPUs and two nodes with four."""
    head = Node(node_id="a1", ip="10.0.0.1", total={"CPU": 8}, free={"CPU": 8}, head=True)
    rest = [
        Node(node_id=name, ip=ip, total={"CPU": 32, "GPU": 4}, free={"CPU": 32, "GPU": 4}, labels={"rack": rack})
        for name, ip, rack in (("b2", "10.0.0.2", "x"), ("c3", "10.0.0.3", "y"))
    ]
    path = tmp_path / "cluster.json"
    path.write_bytes(msgspec.json.encode({"snapshot": Snapshot((head, *rest))}))
    return str(path)


def test_the_table_says_where_each_rank_goes(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--snapshot", saved, "--data-parallel-size", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "5 ranks of {GPU: 1, CPU: 1}, strategy fill"
    ranks = [line.split()[:4] for line in lines if line.startswith("dp_rank_")]
    assert ranks[0] == ["dp_rank_0", "0", "10.0.0.2", "b2"]
    assert ranks[4] == ["dp_rank_4", "0", "10.0.0.3", "c3"]


def test_json_can_be_planned_on_again(saved: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["plan", "--snapshot", saved, "--data-parallel-size", "2", "--device", "cpu", "--json"]) == 0
    out = capsys.readouterr().out
    document = json.loads(out)
    assert document["fits"] is True
    assert [(rank["rank"], rank["node_id"]) for rank in document["plan"]["ranks"]] == [(0, "a1"), (1, "a1")]
    again = tmp_path / "again.json"
    again.write_text(out)
    assert main(["plan", "--snapshot", str(again), "--data-parallel-size", "2", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == document


def test_a_refusal_has_its_own_status(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "--snapshot", saved, "--data-parallel-size", "5", "--nodes", "rack=x,10.0.0.7"]
    assert main(asked) == 1
    text = capsys.readouterr().out
    assert "room for 4 of 5" in text and "correct 10.0.0.7" in text and "not in nodes" in text
    assert main([*asked, "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["fits"] is False and len(document["refusal"]["rooms"]) == 3


def test_strategies_and_devices_can_be_chosen(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["plan", "--snapshot", saved, "--json", "--data-parallel-size"]
    assert main([*base, "1", "--pack-strategy", "span", "--tensor-parallel-size", "8"]) == 0
    (rank,) = json.loads(capsys.readouterr().out)["plan"]["ranks"]
    assert rank["bundle_nodes"] == ["b2"] * 4 + ["c3"] * 4 + ["b2"] and rank["strategy"] == "PACK"
    strict = [*base, "4", "--pack-strategy", "strict", "--data-parallel-size-local", "2"]
    assert main(strict) == 0
    assert [r["node_id"] for r in json.loads(capsys.readouterr().out)["plan"]["ranks"]] == ["b2", "b2", "c3", "c3"]
    assert main([*base, "9", "--device", "cpu", "--cpus-per-rank", "8"]) == 0
    assert [r["node_id"] for r in json.loads(capsys.readouterr().out)["plan"]["ranks"]] == [
        "a1",
        *["b2"] * 4,
        *["c3"] * 4,
    ]


def test_what_cannot_be_carried_out_says_why(saved: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{"snapshot": {"nodes": [{"node_id": "a1"}]}}')
    config = tmp_path / "config.yaml"
    config.write_text("applications: []\n")
    for arguments, said in [
        (["--snapshot", saved], "--data-parallel-size"),
        (["--snapshot", saved, "--data-parallel-size", "0"], "data_parallel_size=0"),
        (["--snapshot", str(tmp_path / "none"), "--data-parallel-size", "1"], "No such file"),
        (["--snapshot", str(broken), "--data-parallel-size", "1"], "snapshot.nodes"),
        (["--address", "127.0.0.1:1", "--data-parallel-size", "1"], "no Ray cluster at 127.0.0.1:1"),
        (["--address", "ray://head:10001", "--data-parallel-size", "1"], "expected host:port"),
        (["--snapshot", saved, "--config", str(config)], "no `applications`"),
        (["--snapshot", saved, "--config", str(tmp_path / "none.yaml")], "No such file"),
    ]:
        assert main(["plan", *arguments]) == 2
        assert said in capsys.readouterr().err


def test_a_config_file_is_planned_with_fields_replaced(
    saved: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    config = tmp_path / "serve.yaml"
    config.write_text(
        f"""
applications:
  - name: accordion
    args: {{model: {model}, device: cpu, cpus_per_rank: 4}}
    deployments:
      - name: Ingress
        user_config: {{data_parallel_size: 3}}
"""
    )
    assert main(["plan", "--snapshot", saved, "--config", str(config)]) == 0
    assert "3 ranks of {CPU: 4}, strategy fill" in capsys.readouterr().out
    assert main(["plan", "--snapshot", saved, "--config", str(config), "--data-parallel-size", "40"]) == 1
    assert "room for 18 of 40" in capsys.readouterr().out
