"""`fastserve up` and `fastserve down`: from a manifest to an endpoint, and back to nothing."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psutil

from fastserve import errors
from fastserve.artifacts.stores import open_store
from fastserve.cli import render
from fastserve.cli.chat import stream
from fastserve.cli.manifests import read_manifests, require_keys_open
from fastserve.cli.screen import Screen
from fastserve.cluster import tender
from fastserve.cluster.access import apply_access_key, local_key
from fastserve.cluster.gateway_process import GatewayProcess
from fastserve.cluster.home import Home
from fastserve.cluster.local import Beat, LocalCluster
from fastserve.cluster.status import status_of
from fastserve.cluster.survey import Survey, machines_here, survey, tries_so_far
from fastserve.errors import ClusterFailed, FastServeError, UsageInvalid
from fastserve.plan import gate as gates
from fastserve.plan import keys
from fastserve.plan.moves import Done, Refuse
from fastserve.plan.stages import Stage
from fastserve.plan.steps import ROLLED_BACK
from fastserve.spec.model import AccessKey, HardwareProfile, Model

WORK_SECONDS = 0.5
"""Between two looks while stages run."""

SERVE_SECONDS = 2.0
"""Between two looks while all is well."""

HELLO = "What is the capital of France?"
_JSON = "-H 'Content-Type: application/json' -d"
EXAMPLES = {
    "generate": (
        "chat/completions",
        f"""{_JSON} '{{"model": "NAME", "messages": [{{"role": "user", "content": "{HELLO}"}}]}}'""",
    ),
    "embed": ("embeddings", f"""{_JSON} '{{"model": "NAME", "input": ["cat", "kitten"]}}'"""),
    "score": ("rerank", f"""{_JSON} '{{"model": "NAME", "query": "young cat", "documents": ["kitten", "train"]}}'"""),
    "transcribe": ("audio/transcriptions", "-F model=NAME -F file=@speech.wav"),
}
"""Path and arguments of curl by serve.task; NAME is the model's."""


def up(file: Path, home: Home, *, detach: bool, port: int | None, store: str | None, as_json: bool) -> None:
    """Bring the models of a manifest up; stay until Ctrl-C, or return with --detach when they are ready."""
    manifests = read_manifests(file)
    models = [item for item in manifests if isinstance(item, Model)]
    access_keys = [item for item in manifests if isinstance(item, AccessKey)]
    profiles = [item for item in manifests if isinstance(item, HardwareProfile)]
    if not models and not access_keys:
        raise UsageInvalid(f"{file} holds no Model; add one, or an AccessKey")
    require_keys_open(access_keys)
    store_uri = store or home.store_uri
    open_store(store_uri).names("artifacts/")  # a wrong store is refused before anything else happens
    GatewayProcess(home).choose_port(port)  # and so is a port that is taken
    here = machines_here(home)
    surveys = [survey(home, store_uri, model, profiles, here) for model in models]
    if not as_json:
        for found in surveys:
            render.sheet(found.sheet, console=render.err)
    signal.signal(signal.SIGTERM, _like_ctrl_c)
    tender.dismiss(home)  # a detached one hands over; a foreground one keeps its lock, and `tended` refuses
    with home.tended(detached=False):
        if store is not None:
            home.set_store(store)
        _apply(home, surveys, access_keys, profiles)
        run = Run(home, [model.name for model in models], port, detach, as_json)
        goes_on = run.to_the_end()
    if goes_on:
        tender.spawn(home)
    if run.refusal is not None:
        raise run.refusal


def _apply(
    home: Home, surveys: Sequence[Survey], access_keys: Sequence[AccessKey], profiles: Sequence[HardwareProfile]
) -> None:
    """Write what is wanted into the home."""
    for wanted in access_keys:
        made = apply_access_key(home, wanted)
        if made is not None:
            render.say(f"key {wanted.metadata.name}: {made} (shown once)")
    store = open_store(home.store_uri)
    for found in surveys:
        home.set_profiles(found.model.name, {profile.metadata.name: profile.spec for profile in profiles})
        pin = home.pin(found.model.name)
        if pin is not None and pin.reason == ROLLED_BACK:
            home.set_pin(found.model.name, None)  # asking again is trying again
        home.want(found.model, found.digests, tries_so_far(store, found))


class Run:
    """One `up`, from the first look to the last."""

    def __init__(self, home: Home, names: Sequence[str], port: int | None, detach: bool, as_json: bool) -> None:
        self._home = home
        self._names = names
        self._detach = detach
        self._json = as_json
        self._screen = Screen(quiet=as_json)
        self._cluster = LocalCluster(home, port, self._screen.say)
        self._was_serving = bool(home.serving())
        self._stays = False  # True once the models are ready and go on until Ctrl-C
        self._shown: set[str] = set()
        self.refusal: FastServeError | None = None
        """What the models were refused for; None when all is well."""

    def to_the_end(self) -> bool:
        """Work until the models are ready, and with no --detach until Ctrl-C. True: what runs shall go on running."""
        try:
            with self._screen:
                self._cluster.forget_failed()
                beats = self._until_settled()
            self.refusal = _refusal(beats)
            self._show_results(beats)
            if self.refusal is not None:
                return self._leave(keep=self._was_serving)
            serves = any(beat.model.spec.serve is not None for beat in beats)
            self._stays = serves and not self._detach
            if not self._json:
                self._show_endpoints(beats)
            if self._stays:
                self._stay()
            return self._leave(keep=serves)
        except KeyboardInterrupt:
            self._leave(keep=False)
            if not self._stays:
                raise
            return False  # the models were ready, and Ctrl-C is how their run ends
        except FastServeError:
            self._leave(keep=self._was_serving)
            raise

    def _until_settled(self) -> list[Beat]:
        """Beat until every model of this run is done or refused."""
        while True:
            beats = [beat for beat in self._cluster.beat() if beat.model.name in self._names]
            for beat in beats:
                self._screen.show(self._status(beat))
                if len(beat.observed.committed) and beat.model.name not in self._shown:
                    self._show_comparison(beat)
            if all(isinstance(move, Done | Refuse) for beat in beats for move in beat.moves):
                return beats
            time.sleep(WORK_SECONDS)

    def _status(self, beat: Beat) -> dict[str, Any]:
        return status_of(beat.model, beat.observed, beat.moves, self._cluster.store, self._cluster.gateway.url)

    def _show_comparison(self, beat: Beat) -> None:
        """The table of parent against candidate, as soon as it is measured."""
        evaluate = beat.model.spec.evaluate
        key = keys.stage_keys(beat.model, beat.observed.digests).get(Stage.EVALUATE)
        done = beat.observed.committed.get(key) if key is not None else None
        if evaluate is not None and done is not None and not self._json:
            self._shown.add(beat.model.name)
            render.comparison(done.metrics, gates.decide(done.metrics, evaluate.gate), console=render.err)

    def _show_results(self, beats: Sequence[Beat]) -> None:
        if self._json:
            found = [self._status(beat) for beat in beats]
            render.as_json(found[0] if len(found) == 1 else found)

    def _show_endpoints(self, beats: Sequence[Beat]) -> None:
        """URL, key, a curl line, and of a model that chats one real answer."""
        url, key = self._cluster.gateway.url, local_key(self._home)
        for beat in beats:
            if beat.model.spec.serve is None:
                continue
            name = beat.model.name
            render.say(f"\n{name} is ready", style="bold green")
            render.say(f"  URL   {url}\n  key   {key}")
            path, rest = EXAMPLES[beat.model.spec.serve.task]
            render.say(f"  curl {url}/{path} -H 'Authorization: Bearer {key}' {rest.replace('NAME', name)}")
            if beat.model.spec.serve.task != "generate":
                continue
            render.say(f"\n> {HELLO}")
            for piece in stream(
                self._home, name, [{"role": "user", "content": HELLO}], {"max_tokens": 64, "temperature": 0}
            ):
                render.answer(piece, end="")
            render.answer("")
        if not self._detach and any(beat.model.spec.serve is not None for beat in beats):
            render.say("\nCtrl-C ends it.", style="dim")

    def _stay(self) -> NoReturn:
        """Tend until Ctrl-C, which comes as KeyboardInterrupt."""
        said: Mapping[str, str] = {}
        while True:
            time.sleep(SERVE_SECONDS)
            try:
                said = self._tell_changes(said)
            except ClusterFailed as error:
                render.say(f"{error.reason}: {error}; trying again")

    def _tell_changes(self, said: Mapping[str, str]) -> dict[str, str]:
        now = {beat.model.name: " ".join(move.because for move in beat.moves) for beat in self._cluster.beat()}
        for name, because in now.items():
            if said and said.get(name) != because:
                render.say(f"{name}: {because}")
        return now

    def _leave(self, keep: bool) -> bool:
        """End everything unless it shall go on; a second Ctrl-C, or SIGTERM, does not tear the clean-up."""
        if not keep:
            before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                if self._stays:
                    render.say("\nstopping")
                self._cluster.stop()
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
        return keep


def down(home: Home, name: str | None, as_json: bool) -> None:
    """End one model, or everything that runs in the home."""
    known = home.model_names()
    if name is not None and name not in known:
        raise UsageInvalid(f"no model named {name} is up in {home.path} (up: {', '.join(known) or 'none'})")
    if name is not None and known != [name]:
        home.unwant(name)
        home.set_weights(name, {})
        stopped = [name]
    else:
        _end_tender(home)
        with home.tended(detached=False):
            LocalCluster(home).stop()
        stopped = known
    if as_json:
        render.as_json({"stopped": stopped})
    else:
        render.say(f"stopped: {', '.join(stopped) or 'nothing was up'}")


def _end_tender(home: Home) -> None:
    """Ask whoever tends the home to stop, detached or in the foreground of another terminal."""
    owner = home.tender()
    if owner is None or tender.dismiss(home):
        return
    try:
        process = psutil.Process(owner["pid"])
        process.terminate()
        process.wait(120)
    except psutil.NoSuchProcess:
        return
    except psutil.TimeoutExpired:
        raise ClusterFailed(
            f"process {owner['pid']} does not end; end it with `kill {owner['pid']}` and run `fastserve down` again"
        ) from None


def _refusal(beats: Sequence[Beat]) -> FastServeError | None:
    """The first refusal as the error it stands for, so that the exit code follows."""
    for beat in beats:
        for move in beat.moves:
            if isinstance(move, Refuse):
                kind = getattr(errors, move.reason, errors.StageFailed)
                return (
                    kind(f"{beat.model.name}: {move.because}")
                    if issubclass(kind, FastServeError)
                    else errors.StageFailed(move.because)
                )
    return None


def _like_ctrl_c(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
