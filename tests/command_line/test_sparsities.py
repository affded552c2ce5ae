"""The command `prune` with a sparsity for each weight, chosen by names."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from command_line import SHORT, byte_tokenizer, config, failed, refused, run

from safe_core import NM, Unstructured
from safe_core.command_line.pruning import PruningJob
from safe_core.command_line.sparsities import parse_rules


def test_the_first_rule_that_matches_counts() -> None:
    texts = [r"layers\.0=2:4", "0.5", "down=0.75", "=x=0.25"]
    rules = parse_rules(texts, "row")
    assert rules.default == Unstructured(0.5, scope="row")
    assert rules("layers.0.down") == NM(2, 4)
    assert rules("layers.1.down") == Unstructured(0.75, scope="row")
    assert rules("layers.1.up") == Unstructured(0.5, scope="row")
    assert rules("a=x") == Unstructured(0.25, scope="row")
    assert parse_rules(["down=0.75"])("up") is None
    assert hash(rules) == hash(parse_rules(texts, "row"))


def test_wrong_rules_are_refused() -> None:
    for texts, message in (
        (["0.5", "0.6"], "one default, got 0.5 and 0.6"),
        (["up=half"], "or owl:0.5, got 'half'$"),
        (["owl"], "or owl:0.5, got 'owl'$"),
        (["50"], "or owl:0.5, got '50': write 0.5 for 50 percent$"),
        (["62.5%"], "got '62.5%': write 0.625 for 62.5 percent$"),
        (["1"], "got '1'$"),
        (["100%"], "got '100%'$"),
        (["owl:60"], "a fraction as SPARSITY, .* got 'owl:60': write 0.6 for 60 percent$"),
        (["owl:0.95"], r"sparsity in \[0, 1\): it varies by LAMBDA = 0.08, got 'owl:0.95'"),
        (["(=0.5"], r"sparsity must be a regular expression, got '\('"),
        (["=0.5"], "an empty one"),
        ([], "sparsity must be given"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_rules(texts)
    with pytest.raises(ValueError, match="scope must be left out for sparsity N:M"):
        PruningJob("model", ["text.txt"], ["2:4", "up=4:8"], scope="row")
    PruningJob("model", ["text.txt"], ["2:4", "up=0.5"], scope="row")


@pytest.mark.parametrize("method", ["magnitude", "safe"])
def test_weights_get_their_own_sparsity(
    folder: Path, text: Path, tmp_path: Path, method: str
) -> None:
    out = tmp_path / "out"
    epochs = ["--epochs", 1] if method == "safe" else []
    result = run(
        "prune", folder, "--calibration", text, "--out", out, *SHORT, "--method", method, *epochs,
        "--sparsity", "0.5", "--sparsity", "down_proj=2:4", "--sparsity", r"layers\.1\..*=0.75",
        "--ignore", r"q_proj|layers\.0\.mlp\.up",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    for name, p in model.named_parameters():
        share = float((p == 0).float().mean())
        if "_proj" not in name or "q_proj" in name or "layers.0.mlp.up" in name:
            assert share == 0, name
        elif "down_proj" in name:
            assert bool(((p.reshape(-1, 4) != 0).sum(-1) == 2).all())
        else:
            assert share == (0.75 if "layers.1" in name else 0.5), name
    assert "not pruned, because --only or --ignore leaves it out: " in result.stdout
    assert "model.layers.0.mlp.up_proj.weight" in result.stdout
    card = (out / "README.md").read_text()
    assert "| requested sparsity | 0.5, scope tensor; 2:4 for down\\_proj; 0.75" in card
    assert r"those whose name matches `q_proj\|layers\.0\.mlp\.up`" in card
    assert "| `model.layers.0.mlp.up_proj.weight` | --only or --ignore leaves it out |" in card


def test_without_a_default_the_others_stay_dense(folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(
        "prune", folder, "--calibration", text, "--out", out, *SHORT, "--method", "magnitude",
        "--sparsity", "mlp=0.5",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    for name, p in model.named_parameters():
        assert int((p == 0).sum()) == (p.numel() // 2 if "mlp" in name else 0)
    assert "not pruned, because --sparsity gives it no pattern: " in result.stdout


def test_expressions_that_match_nothing_are_refused(
    folder: Path, text: Path, tmp_path: Path
) -> None:
    prune = ["prune", folder, "--calibration", text, "--out", tmp_path / "out", *SHORT]
    for option, argument in (("--only", "only"), ("--ignore", "ignore")):
        message = failed(*prune, option, "mpl")
        assert f"{argument} must match the name of a weight, got 'mpl': names are such" in message
    message = failed(*prune, "--sparsity", "0.5", "--sparsity", "embed=0.9")
    assert (
        "sparsity must match the name of a weight that is pruned, got 'embed': names are" in message
    )
    message = refused(*prune, "--ignore", "")
    assert "ignore must be a regular expression of a name, got an empty" in message
    message = failed(*prune, "--sparsity", "0.5", "--sparsity", "down=3:12")
    assert "12 must divide the inputs of every weight for --sparsity 3:12, got 32" in message


def test_groups_that_fit_some_weights_can_stay_there(text: Path, tmp_path: Path) -> None:
    """The error names the others by a regular expression, which does as it says."""
    odd = transformers.LlamaForCausalLM(config(intermediate_size=30))
    odd.save_pretrained(tmp_path / "odd")
    byte_tokenizer().save_pretrained(tmp_path / "odd")
    prune = ["prune", tmp_path / "odd", "--calibration", text, *SHORT, "--method", "magnitude",
             "--out", tmp_path / "out", "--sparsity", "2:4"]  # fmt: skip
    message = failed(*prune)
    assert "4 must divide the inputs of every weight for --sparsity 2:4, got 30 of " in message
    assert message.endswith(
        "mlp.down_proj.weight: --sparsity 1:2 or 0.5 would do; or, to keep 2:4 for the other "
        "weights, put --sparsity 'mlp.down_proj=0.5' first, or leave these dense by --ignore "
        "'mlp.down_proj'\n"
    )
    assert run(*prune, "--sparsity", "mlp.down_proj=0.5", "--dry-run").exit_code == 0
    assert run(*prune, "--ignore", "mlp.down_proj", "--dry-run").exit_code == 0


def test_a_run_with_rules_resumes(folder: Path, text: Path, tmp_path: Path) -> None:
    rules = ["--sparsity", "0.5", "--sparsity", "down=2:4"]
    prune = ["prune", folder, "--calibration", text, *SHORT, "--method", "wanda", "--work-dir",
             tmp_path / "work"]  # fmt: skip
    assert run(*prune, *rules, "--out", tmp_path / "one").exit_code == 0
    assert run(*prune, *rules, "--out", tmp_path / "two").exit_code == 0
    message = failed(*prune, "--sparsity", "0.5", "--out", tmp_path / "three")
    assert "sparsity was ByName(...), now Unstructured(sparsity=0.5, " in message
    assert len(message) < 900
