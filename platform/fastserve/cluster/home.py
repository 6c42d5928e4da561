"""A home folder: all that a laptop keeps between two looks, as small files that are replaced whole.

    store/                      artifacts (unless the store is elsewhere: settings.json)
    models/<name>/model.json    what is wanted: the manifest as it was applied
    models/<name>/ended.json    what was wanted last, of a model that is up no longer
    models/<name>/resolved.json digests of the outside sources, found out once for each `up`
    models/<name>/profiles.json the HardwareProfiles that stood beside it
    models/<name>/forgiven.json failed attempts that do not count, since the user asked again
    models/<name>/weights.json  percent of traffic by revision, since when, why, and which one had all of it last
    models/<name>/pin.json      a rollback, while it holds
    models/<name>/revisions/    what each revision serves, by digest
    serving/<app>.json          the revisions that the serving cluster must have
    keys.json, local.key        digests of the access keys; the laptop's own key, readable by its owner alone
    cluster/, gateway/, logs/   what runs, and what it says
    up.json, lock               who tends this home

The folder takes the place that etcd has on a cluster. Nothing in it is a plan or a to-do list: what to do next is
computed from what is observed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from fastserve.errors import HomeInUse, StoreFailed, StoreFull, UsageInvalid
from fastserve.plan.observed import Pin
from fastserve.plan.revision import Revision
from fastserve.spec.hardware import HardwareProfileSpec
from fastserve.spec.load import dump
from fastserve.spec.model import Model

DEFAULT_HOME = "~/.fastserve"

MOST_REVISIONS = 100
"""Of a model, beside those in use: each look reads them all, and a cluster keeps them in one small object."""

LOOK_SECONDS = 2.0
"""How long a lock that nobody signs may be held by somebody who only looks."""

_KEPT_IN = ("models", "serving", "cluster", "gateway")
"""Folders of small files."""

_TORN = re.compile(r"\.(?:new|config\.json)[-.](\d+)-")
"""Names of files that are being written, with the process that writes them."""


class Home:
    """The state of one laptop "cluster"."""

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = Path(path or os.environ.get("FASTSERVE_HOME") or DEFAULT_HOME).expanduser().resolve()

    @property
    def id(self) -> str:
        """16 hex digits that every process of this home carries in FASTSERVE_HOME_ID."""
        return hashlib.sha256(str(self.path).encode()).hexdigest()[:16]

    def create(self) -> None:
        """Make the folder, closed to others."""
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            for folder in ("models", "serving", "cluster", "gateway", "logs", "cache"):
                (self.path / folder).mkdir(exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UsageInvalid(f"--home {self.path} is not a folder; name another") from error
        except PermissionError as error:
            raise UsageInvalid(f"--home {self.path} may not be written; name a folder of your own") from error

    # -- small files ---------------------------------------------------------------------------------------------

    def read_json(self, name: str) -> Any:
        """The value in a file of the home; None when there is no such file."""
        try:
            return json.loads((self.path / name).read_text())
        except FileNotFoundError:
            return None
        except json.JSONDecodeError as error:
            raise StoreFailed(
                f"{self.path / name} is damaged ({error}); remove it and run `fastserve up` again"
            ) from error

    def write_json(self, name: str, value: Any, mode: int = 0o600) -> None:
        """Replace a file of the home whole; a reader sees the old value or the new one."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(value, indent=1, sort_keys=True) + "\n"
        with self._beside(target, text, mode) as new:
            os.replace(new, target)

    @contextmanager
    def _beside(self, target: Path, text: str, mode: int) -> Iterator[Path]:
        """A file with `text` in the folder of `target`, gone at the end; its name tells which process is at it."""
        new = target.parent / f".new-{os.getpid()}-{secrets.token_hex(6)}"
        try:
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(text)
            os.chmod(new, mode)
            yield new
        except OSError as error:
            raise StoreFull(f"no space left for {target}; make room, nothing was torn") from error
        finally:  # after Ctrl-C as well: it comes at any line
            new.unlink(missing_ok=True)

    def clear_torn(self) -> None:
        """Remove the half-written files of processes that were killed."""
        for path in (*self.path.glob(".*"), *(path for name in _KEPT_IN for path in (self.path / name).rglob(".*"))):
            owner = _TORN.match(path.name)
            if owner is not None and not Path(f"/proc/{owner[1]}").exists():
                path.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Take a file of the home away, if it is there."""
        (self.path / name).unlink(missing_ok=True)

    def listed(self, pattern: str) -> list[str]:
        """Names of the home's files that fit a pattern, such as `models/*/model.json`, sorted."""
        return sorted(str(path.relative_to(self.path)) for path in self.path.glob(pattern))

    # -- settings ------------------------------------------------------------------------------------------------

    @property
    def store_uri(self) -> str:
        """Where artifacts are kept."""
        settings = self.read_json("settings.json") or {}
        return str(settings.get("store") or self.path / "store")

    @property
    def has_own_store(self) -> bool:
        """Whether artifacts are kept in the home itself, where nobody else writes."""
        return self.store_uri == str(self.path / "store")

    def set_store(self, uri: str) -> None:
        """Keep artifacts elsewhere from now on."""
        self.write_json("settings.json", {**(self.read_json("settings.json") or {}), "store": uri})

    # -- models --------------------------------------------------------------------------------------------------

    def model_names(self) -> list[str]:
        """Models that are wanted now."""
        return [name.split("/")[1] for name in self.listed("models/*/model.json")]

    def known_models(self) -> list[str]:
        """Models that were ever wanted here."""
        return sorted({name.split("/")[1] for name in self.listed("models/*/*")})

    def model(self, name: str) -> Model | None:
        """What is wanted of a model; None when nothing is."""
        value = self.read_json(f"models/{name}/model.json")
        return None if value is None else Model.model_validate(value)

    def ended(self, name: str) -> Model | None:
        """What was wanted last of a model that is wanted no longer; None when it is wanted, or never was."""
        value = self.read_json(f"models/{name}/ended.json") if self.model(name) is None else None
        return None if value is None else Model.model_validate(value)

    def want(self, model: Model, resolved: Mapping[str, str], forgiven: Mapping[str, int]) -> None:
        """Apply a manifest, with the digests of its sources as they are now and the attempts that no longer count."""
        self.write_json(f"models/{model.name}/forgiven.json", dict(forgiven))
        self.write_json(f"models/{model.name}/resolved.json", dict(resolved))
        self.write_json(f"models/{model.name}/model.json", dump(model))

    def unwant(self, name: str) -> None:
        """Want a model no longer. Its artifacts and revisions stay, and so does what was wanted, to be looked at."""
        wanted = self.read_json(f"models/{name}/model.json")
        if wanted is not None:
            self.write_json(f"models/{name}/ended.json", wanted)
        self.remove(f"models/{name}/model.json")

    def resolved(self, name: str) -> dict[str, str]:
        """Digests of the model's outside sources."""
        return dict(self.read_json(f"models/{name}/resolved.json") or {})

    def set_resolved(self, name: str, ident: str, digest: str) -> None:
        """Note the digest of one outside source."""
        self.write_json(f"models/{name}/resolved.json", {**self.resolved(name), ident: digest})

    def profiles(self, name: str) -> dict[str, HardwareProfileSpec]:
        """The HardwareProfiles that were described when the model was applied, by name."""
        found = self.read_json(f"models/{name}/profiles.json") or {}
        return {profile: HardwareProfileSpec.model_validate(spec) for profile, spec in found.items()}

    def set_profiles(self, name: str, profiles: Mapping[str, HardwareProfileSpec]) -> None:
        """Keep what the machines of each profile have and cost."""
        plain = {profile: spec.model_dump(mode="json", by_alias=True) for profile, spec in profiles.items()}
        self.write_json(f"models/{name}/profiles.json", plain)

    def forgiven(self, name: str) -> dict[str, int]:
        """By key, the newest attempt that does not count as a try."""
        return dict(self.read_json(f"models/{name}/forgiven.json") or {})

    def weights(self, name: str) -> dict[str, int]:
        """Percent of traffic by revision digest."""
        return {digest: int(weight) for digest, weight in self._routes(name).get("weights", {}).items()}

    def set_weights(self, name: str, weights: Mapping[str, int], because: str = "") -> None:
        """Route the model's traffic so from now on. Weights that are in force already keep their time, unless it lies
        in the future: then the clock was set back."""
        before, now = self._routes(name), time.time()
        at = before.get("at")
        if before.get("weights") == dict(weights) and at is not None and at <= now:
            return
        whole = next((digest for digest, weight in weights.items() if weight == 100), None)
        proven = (whole or before.get("proven")) if weights else None
        if whole is not None:
            self._note_proven(name, whole)
        value = {"weights": dict(weights), "at": now, "because": because, "proven": proven}
        self.write_json(f"models/{name}/weights.json", value)

    def _note_proven(self, name: str, digest: str) -> None:
        """Keep in mind that a revision had all the traffic: a rollback goes to such a one."""
        file = f"models/{name}/revisions/{digest}.json"
        value = self.read_json(file)
        if value is not None and not value.get("proven"):
            self.write_json(file, {**value, "proven": True})

    def shifted_at(self, name: str) -> float | None:
        """Unix seconds at which the weights became what they are; None when that is not known."""
        at = self._routes(name).get("at")
        return None if at is None else float(at)

    def proven(self, name: str) -> str | None:
        """Digest of the last revision that had all the traffic; None when none ever had."""
        found = self._routes(name).get("proven")
        return None if found is None else str(found)

    def _routes(self, name: str) -> dict[str, Any]:
        value = self.read_json(f"models/{name}/weights.json") or {}
        if "weights" in value:
            return dict(value)
        whole = next((digest for digest, weight in value.items() if weight == 100), None)
        return {"weights": value, "proven": whole}  # as versions before rollouts wrote it

    def created(self, name: str) -> int:
        """Unix seconds at which the model was first wanted."""
        value = self.read_json(f"models/{name}/created.json")
        if value is None:
            value = {"at": int(time.time())}
            self.write_json(f"models/{name}/created.json", value)
        return int(value["at"])

    def pin(self, name: str) -> Pin | None:
        """The rollback that holds, if any."""
        value = self.read_json(f"models/{name}/pin.json")
        return None if value is None else Pin(**value)

    def set_pin(self, name: str, pin: Pin | None) -> None:
        """Roll back, or end a rollback."""
        if pin is None:
            self.remove(f"models/{name}/pin.json")
        else:
            self.write_json(f"models/{name}/pin.json", asdict(pin))

    def revisions(self, name: str) -> dict[str, dict[str, Any]]:
        """What each known revision of a model serves, oldest first: `{digest: {made_at, ...Revision}}`."""
        found = [self.read_json(file) for file in self.listed(f"models/{name}/revisions/*.json")]
        ordered = sorted((value for value in found if value), key=lambda value: value["made_at"])
        return {value["digest"]: value for value in ordered}

    def keep_revision(self, revision: Revision, made_at: float) -> None:
        """Remember what a revision serves, so that a rollback finds it: of each model the newest MOST_REVISIONS, and
        those in use. Keeping it twice changes nothing."""
        name = f"models/{revision.model}/revisions/{revision.digest}.json"
        if self.read_json(name) is None:
            for digest in self._surplus_revisions(revision.model):
                self.remove(f"models/{revision.model}/revisions/{digest}.json")
            self.write_json(name, {"digest": revision.digest, "made_at": made_at, **revision.to_json()})

    def _surplus_revisions(self, name: str) -> list[str]:
        """Revisions that make room for a new one."""
        pin = self.pin(name)
        used = {*self.weights(name), self.proven(name), *(() if pin is None else (pin.revision, pin.instead_of))}
        used |= {item.digest for item in self.serving().values() if item.model == name}
        return [digest for digest in list(self.revisions(name))[: 1 - MOST_REVISIONS] if digest not in used]

    # -- what the serving cluster must have ------------------------------------------------------------------------

    def serving(self) -> dict[str, Revision]:
        """Revisions that must be up, by application name."""
        found: dict[str, Revision] = {}
        for name in self.listed("serving/*.json"):
            value = self.read_json(name)
            if value is not None:
                found[name.removeprefix("serving/").removesuffix(".json")] = Revision.from_json(value)
        return found

    def start_serving(self, app: str, revision: Revision) -> None:
        """From now on this revision must be up. Asking twice changes nothing."""
        name = f"serving/{app}.json"
        if self.read_json(name) is None:
            self.write_json(name, {"since": time.time(), **revision.to_json()})

    def serving_since(self) -> dict[str, float]:
        """Unix seconds at which each revision was asked to be up, by its name."""
        found: dict[str, float] = {}
        for name in self.listed("serving/*.json"):
            value = self.read_json(name)
            if value is not None and "since" in value:
                found[name.removeprefix("serving/").removesuffix(".json")] = float(value["since"])
        return found

    def stop_serving(self, app: str) -> None:
        """From now on this revision need not be up."""
        self.remove(f"serving/{app}.json")

    # -- who tends -----------------------------------------------------------------------------------------------

    @contextmanager
    def tended(self, detached: bool) -> Iterator[None]:
        """Own this home while the block runs. Raises HomeInUse when another process does."""
        self.create()
        with open(self.path / "lock", "w") as lock:
            self._lock(lock)
            self.write_json("up.json", {"pid": os.getpid(), "detached": detached})
            try:
                yield
            finally:
                self.remove("up.json")

    def _lock(self, lock: IO[str]) -> None:
        """Take the lock. Whoever calls `tender` holds it for a moment, too, and that must not look like an owner."""
        deadline = time.monotonic() + LOOK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if self._owner_lives() or time.monotonic() > deadline:
                    raise HomeInUse(self._who_tends()) from None
                time.sleep(0.01)

    def _owner_lives(self) -> bool:
        """Whether the process that signed as the owner is there."""
        owner = self.read_json("up.json")
        return owner is not None and Path(f"/proc/{owner['pid']}").exists()

    def tender(self) -> dict[str, Any] | None:
        """`{pid, detached}` of the process that tends this home; None when none does."""
        try:
            with open(self.path / "lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return None
        except BlockingIOError:
            value = self.read_json("up.json")
            return dict(value) if value else {"pid": 0, "detached": False}
        return None

    def _who_tends(self) -> str:
        owner = self.read_json("up.json") or {}
        return (
            f"another `fastserve up` (process {owner.get('pid', 'unknown')}) uses the home {self.path}; "
            f"stop it with Ctrl-C there or `fastserve down`, or give this one a --home of its own"
        )

    # -- the laptop's own key --------------------------------------------------------------------------------------

    def local_key(self, make: Any) -> str:
        """The key that this laptop's own commands use; made once, readable by its owner alone."""
        path = self.path / "local.key"
        if not path.exists():
            with self._beside(path, f"{make()}\n", 0o600) as new:
                try:
                    os.link(new, path)  # of several commands at once one makes it, and none reads half a key
                except FileExistsError:
                    pass
                except OSError:  # a file system without hard links
                    os.replace(new, path)
        return path.read_text().strip()

    @staticmethod
    def token() -> str:
        """A fresh random token for a control plane."""
        return secrets.token_hex(32)
