"""From what a user types to a folder: paths win, aliases follow, hub ids come from the cache or not at all."""

import os
import shutil
from pathlib import Path

import pytest

from surgery.errors import CheckpointError, OfflineError, UsageError
from surgery.store.names import ALIASES, known_aliases, open_named, resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def aliases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a user's own aliases lie."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "config" / "surgery").mkdir(parents=True)
    return tmp_path / "config" / "surgery" / "aliases.toml"


def cached(repo: str, source: Path) -> Path:
    """Lay `source` into the hub's cache as snapshot_download would, with the files behind links."""
    root = Path(os.environ["HF_HOME"]) / "hub" / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    for file in (f for f in source.rglob("*") if f.is_file() and f.name != "surgery.json"):
        blob = root / "blobs" / str(abs(hash(str(file))))
        shutil.copy(file, blob)
        link = snapshot / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_an_existing_path_wins(tiny_dit: Path) -> None:
    found = resolve(str(tiny_dit))
    assert found.path == tiny_dit and found.part is None and found.repo is None


@pytest.mark.parametrize("name", ["a@b", "a+b", "a:b", "org/name@main:part", "dit-digits"])
def test_a_path_that_looks_like_something_else_is_a_path(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve(name).path == Path(name)


def test_a_part_may_follow_a_path(tiny_pipeline: Path) -> None:
    checkpoint = open_named(f"{tiny_pipeline}:vae")
    assert checkpoint.selected == "vae" and list(checkpoint.tensors)[0] == "decoder.0.weight"


def test_a_colon_without_a_part_means_the_whole(tiny_dit: Path) -> None:
    found = open_named(f"{tiny_dit}:")
    assert found.selected is None and "config.json" in found.side_files


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").mkdir()
    assert resolve("~/x").path == tmp_path / "x"


def test_the_name_is_kept_as_it_was_typed(tiny_dit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_dit.parent)
    assert open_named("./tiny").name == "./tiny"


def test_an_unknown_name_gets_the_nearest_alias() -> None:
    with pytest.raises(CheckpointError, match="dit-digit: no such file, folder or alias") as caught:
        resolve("dit-digit")
    assert "'dit-digits'" in caught.value.hint


@pytest.mark.parametrize("name", ["", "x" * 5000, "~nobody-of-this-name/x", "a\0b", "./a/b", "/a/b", "a/b/c", "-/x"])
def test_names_that_lead_nowhere_are_errors_of_ours(name: str) -> None:
    with pytest.raises((CheckpointError, UsageError)):
        resolve(name)


def test_control_characters_of_a_name_are_escaped() -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve("\x1b[2J")
    assert "\x1b" not in str(caught.value)


# Aliases


def test_own_aliases_are_read(aliases: Path, tiny_dit: Path) -> None:
    aliases.write_text(f'[aliases]\nmine = "{tiny_dit}"\n')
    found = resolve("mine")
    assert found.path == tiny_dit and found.alias == "mine"


def test_own_aliases_go_before_those_built_in(aliases: Path, tiny_dit: Path) -> None:
    aliases.write_text(f'[aliases]\ndit-xl-2 = "{tiny_dit}"\n')
    assert resolve("dit-xl-2").path == tiny_dit
    assert known_aliases().keys() == ALIASES.keys()


def test_an_alias_may_name_a_part_and_a_typed_part_goes_before_it(aliases: Path, tiny_pipeline: Path) -> None:
    aliases.write_text(f'[aliases]\nmine = "{tiny_pipeline}:vae"\n')
    assert resolve("mine").part == "vae" and resolve("mine:transformer").part == "transformer"


def test_an_alias_that_leads_nowhere_says_so(aliases: Path) -> None:
    aliases.write_text('[aliases]\nmine = "/nowhere/at/all"\n')
    with pytest.raises(CheckpointError, match="mine: the alias names /nowhere/at/all"):
        resolve("mine")


@pytest.mark.parametrize("text", ["aliases = 3", "[aliases]\nx = 3", "[aliases\n", "\udcff"])
def test_a_file_of_aliases_that_cannot_be_read_is_named(aliases: Path, text: str) -> None:
    aliases.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match=r"aliases\.toml"):
        resolve("no-such-name")


# The hub


def test_a_hub_id_comes_from_the_cache_when_offline(tiny_dit: Path) -> None:
    snapshot = cached("org/plain", tiny_dit)
    found = resolve("org/plain", offline=True)
    assert (found.path, found.repo, found.commit) == (snapshot, "org/plain", COMMIT)


def test_a_cached_hub_id_opens_through_its_links_and_keeps_its_commit(tiny_dit: Path) -> None:
    cached("org/linked", tiny_dit)
    checkpoint = open_named("org/linked", offline=True)
    assert checkpoint.digest == open_named(str(tiny_dit)).digest
    assert checkpoint.origin == {"name": "org/linked", "commit": COMMIT} and checkpoint.lineage is None


def test_a_cached_pipeline_opens_by_part(tiny_pipeline: Path) -> None:
    cached("org/pipe", tiny_pipeline)
    assert open_named("org/pipe@main:vae", offline=True).selected == "vae"


def test_without_a_network_the_cache_is_used(tiny_dit: Path) -> None:
    snapshot = cached("org/cut-off", tiny_dit)
    assert resolve("org/cut-off").path == snapshot


def test_an_alias_leads_to_the_hub(aliases: Path, tiny_dit: Path) -> None:
    cached("org/aliased", tiny_dit)
    aliases.write_text('[aliases]\nmine = "hub:org/aliased"\n')
    found = resolve("mine", offline=True)
    assert (found.alias, found.repo) == ("mine", "org/aliased")


@pytest.mark.parametrize("typed", ["org/unknown", "hub:org/unknown", "org/unknown@v1:part", "dit-xl-2"])
def test_a_hub_id_that_is_not_cached_says_how_to_fetch_it(typed: str) -> None:
    with pytest.raises(OfflineError) as caught:
        resolve(typed, offline=True)
    assert "not in the local hub cache" in caught.value.message and "\n" not in caught.value.message
    assert "hf download " + ("facebook/DiT-XL-2-256" if typed == "dit-xl-2" else "org/unknown") in caught.value.hint


def test_an_unknown_revision_is_part_of_the_advice() -> None:
    with pytest.raises(OfflineError) as caught:
        resolve("org/unknown@v1", offline=True)
    assert "--revision v1" in caught.value.hint


def test_the_variable_of_the_hub_s_library_turns_the_network_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OfflineError, match="the network is off"):
        resolve("org/unknown")


def test_a_failed_request_is_an_offline_error_with_its_reason() -> None:
    with pytest.raises(OfflineError, match="could not be fetched: ") as caught:
        resolve("org/unknown")
    assert "the network is off" not in caught.value.message
