"""No stale cache: code that feeds a stage does not change without its version (stage_hashes.py says how to go on)."""

import ast

import stage_hashes


def test_code_and_versions_are_those_on_record():
    changes = stage_hashes.changes()
    assert not changes, "\n".join(
        [
            *changes,
            "If the output changes, raise the stage's version; then, or if it is unchanged: python tests/stage_hashes.py --accept",
        ]
    )


def test_every_stage_is_followed_into_what_it_uses():
    stages = stage_hashes.stages()
    assert {
        "sft",
        "preference",
        "reward",
        "answers",
        "samples",
        "mixture",
        "exam",
        "source",
        "contamination",
        "base_model",
    } <= set(stages)
    assert {
        "ultramed.lm.tokens:encode_rows",
        "ultramed.train.trl_adapter:GroupedByLength",
        "ultramed.lm.attention:causal",
    } <= set(stages["sft"]["code"])
    assert "ultramed.evaluate.generate:decode" in stages["answers"]["code"]
    assert "ultramed.data.knowledge:Ontology" in stages["exam"]["code"]
    assert not any(key.startswith("ultramed.core") for part in stages.values() for key in part["code"])


def test_prose_does_not_count_and_code_does():
    def digest(text: str) -> str:
        return stage_hashes.digest(ast.parse(text).body[0])

    plain = digest('@stage(version=1)\ndef f(x):\n    "what it does"\n    return x + 1')
    assert plain == digest('@stage(version=2)\ndef f(x):\n    # why\n    "other words"\n    return (x\n      + 1)')
    assert plain != digest('@stage(version=1)\ndef f(x):\n    "what it does"\n    return x + 2')


def test_a_change_names_its_stage(monkeypatch, tmp_path):
    record = stage_hashes.stages()
    record["sft"] = {**record["sft"], "code": {**record["sft"]["code"], "ultramed.lm.tokens:encode_rows": "other"}}
    (tmp_path / "r.json").write_text(stage_hashes.json.dumps(record))
    monkeypatch.setattr(stage_hashes, "RECORD", tmp_path / "r.json")
    assert stage_hashes.changes() == ["stage sft: version not raised; changed: ultramed.lm.tokens:encode_rows"]
