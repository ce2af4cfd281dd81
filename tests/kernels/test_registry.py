"""The registry of implementations: choice, explanations, and finding files by itself."""

import sys
import textwrap

import pytest

import distaff.kernels
from distaff.kernels import native, registry

pytestmark = pytest.mark.smoke


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An operation ``twist`` whose files are what a test writes."""
    monkeypatch.setattr(distaff.kernels, "__path__", [*distaff.kernels.__path__, str(tmp_path)])
    package = tmp_path / "twist"
    package.mkdir()
    (package / "__init__.py").write_text("")
    yield package
    registry._implementations.pop("twist", None)
    registry.import_files.cache_clear()
    for name in [name for name in sys.modules if name.startswith("distaff.kernels.twist")]:
        del sys.modules[name]


def write(folder, file, body):
    header = "from distaff.kernels.registry import register\n"
    (folder / f"{file}.py").write_text(header + textwrap.dedent(body))


def test_a_new_file_registers_itself_and_the_highest_priority_that_serves_is_chosen(folder):
    write(folder, "plain", "@register('twist', 'plain')\ndef f(): return 'plain'")
    write(folder, "gpu", "@register('twist', 'gpu', platforms=['cuda', 'rocm'], priority=5)\ndef f(): return 'gpu'")
    write(
        folder,
        "wide",
        """
        def narrow(attributes):
            return None if attributes['width'] >= 64 else f"needs width 64, not {attributes['width']}"

        @register('twist', 'wide', platforms=['cuda'], priority=9, refuses=narrow)
        def f(): return 'wide'
        """,
    )
    chosen = {(p, w): registry.choose("twist", p, {"width": w}).name for p in ("cpu", "cuda", "rocm") for w in (8, 64)}
    assert chosen == {
        ("cpu", 8): "plain", ("cpu", 64): "plain",
        ("cuda", 8): "gpu", ("cuda", 64): "wide",
        ("rocm", 8): "gpu", ("rocm", 64): "gpu",
    }  # fmt: skip
    rows = registry.explain("twist", "cuda", {"width": 8})
    assert [(row.implementation.name, row.chosen, row.reason) for row in rows] == [
        ("wide", False, "needs width 64, not 8"),
        ("gpu", True, "serves this call"),
        ("plain", False, "gpu has priority 5, above 0"),
    ]
    assert registry.explain("twist", "cpu", {"width": 8})[1].reason == "is for cuda, rocm, not cpu"


def test_a_survey_asks_every_operation_for_its_usual_calls(monkeypatch):
    def served():
        return {(choice.operation, choice.call): choice.served_by for choice in registry.survey("cpu")}

    monkeypatch.setattr(native, "available", lambda: True)
    found = served()
    assert {operation.partition(".")[0] for operation, _ in found} == {"matmul", "paged_attention", "sampling"}
    assert found["matmul", "q4_1"] == found["paged_attention", "bfloat16 pages"] == "native"
    assert found["paged_attention", "a mask of its own"] == "xla"
    monkeypatch.setattr(native, "available", lambda: False)
    assert found.keys() == served().keys() and set(served().values()) == {"reference", "xla"}
    for choice in registry.survey("cpu"):
        reasons = {v.implementation.name: v.reason for v in choice.verdicts if not v.chosen}
        assert reasons["native"] == "is not built: this installation was made without a C++ compiler"


def test_nothing_serves(folder):
    write(folder, "tpu", "@register('twist', 'tpu', platforms=['tpu'])\ndef f(): pass")
    with pytest.raises(registry.NoImplementationError, match=r"twist on cpu for \{'n': 1\}: tpu is for tpu, not cpu"):
        registry.choose("twist", "cpu", {"n": 1})


def test_unknown_operation(folder):
    with pytest.raises(registry.UnknownOperationError, match="no folder 'warp'"):
        registry.choose("warp", "cpu", {})
    with pytest.raises(registry.UnknownOperationError, match=r"no file of .* registers"):
        registry.explain("twist", "cpu", {})


def test_a_file_that_cannot_be_imported_is_not_taken_for_an_unknown_operation(folder):
    write(folder, "broken", "import no_such_module")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        registry.choose("twist", "cpu", {})


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"name": "a", "priority": 1}, "already has an implementation 'a'"),
        ({"name": "b"}, "'b' and 'a' share platforms and priority 0"),
        ({"name": "b", "platforms": ["cuda"]}, "'b' and 'a' share platforms and priority 0"),
    ],
)
def test_ambiguous_registrations_are_refused(folder, second, message):
    registry.register("twist", "a")(lambda: None)
    with pytest.raises(ValueError, match=message):
        registry.register("twist", **second)(lambda: None)


def test_equal_priorities_on_different_platforms_are_fine(folder):
    for platform in ("cuda", "tpu"):
        registry.register("twist", platform, platforms=[platform])(lambda: None)
        assert registry.choose("twist", platform, {}).name == platform
