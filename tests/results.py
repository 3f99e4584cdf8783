"""The schema that result.json has for every task."""

import json

KEYS = {
    "version", "task", "model", "data", "rows", "skipped", "examples_skipped", "metrics", "chance",
    "baselines", "groups", "precision", "device", "processes", "versions", "options", "minutes",
}  # fmt: skip


def read_result(folder):
    """What an evaluation wrote, once it is known to keep the schema."""
    result = json.loads((folder / "result.json").read_text())
    check_schema(result)
    return result


def check_schema(result):
    """Metrics are numbers beside their intervals; chance, baselines and groups have their names."""
    assert set(result) >= KEYS
    assert result["version"] == 2
    assert isinstance(result["data"], list)
    blocks = {name: baseline["metrics"] for name, baseline in result["baselines"].items()}
    if result["model"] is None:
        assert result["metrics"] is None
    else:
        blocks["model"] = result["metrics"]
        check_metrics(result["metrics"])
        assert set(result["chance"]) <= set(result["metrics"])
    names = set().union(*blocks.values())
    assert all(set(metrics) <= names for metrics in blocks.values())
    for groups in result["groups"].values():
        for metrics in groups.values():
            check_metrics(metrics)
            assert set(metrics) <= names


def check_metrics(metrics):
    assert metrics["n"] >= 0
    for name, value in metrics.items():
        if name.endswith("_ci") and value is not None:
            low, high = value
            assert low - 1e-9 <= metrics[name.removesuffix("_ci")] <= high + 1e-9, name
        else:
            assert value is None or isinstance(value, (int, float)), name
