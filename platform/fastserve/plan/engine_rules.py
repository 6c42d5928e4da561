"""Which of vLLM's flags `serve.engine.extraArgs` may carry: an allow-list, so that a new flag of a new vLLM opens
nothing.

Allowed is what only tunes speed, memory or the form of answers. Refused by name is what the manifest says elsewhere,
what loads code or files, what opens the engine to the network, and what writes prompts into logs.
"""

from __future__ import annotations

import re
from difflib import get_close_matches

from fastserve.errors import Problem
from fastserve.plan.engine_flags import FLAGS, SWITCHES, VLLM_VERSION

_TUNING = (
    "async-scheduling attention-backend block-size cpu-offload-gb cudagraph-capture-sizes cudagraph-metrics "
    "default-chat-template-kwargs disable-cascade-attn disable-chunked-mm-input disable-custom-all-reduce "
    "disable-hybrid-kv-cache-manager disable-sliding-window enable-auto-tool-choice "
    "enable-chunked-prefill enable-flashinfer-autotune enable-force-include-usage enable-mfu-metrics "
    "enable-per-request-metrics enable-prompt-tokens-details enable-request-id-headers "
    "exclude-tools-when-tool-choice-none gpu-memory-utilization kv-cache-dtype kv-cache-metrics "
    "kv-cache-metrics-sample kv-offloading-size language-model-only limit-mm-per-prompt linear-backend "
    "logprobs-mode long-prefill-token-threshold long-prefill-token-threshold-adaptive "
    "max-cudagraph-capture-size max-logprobs max-num-active-seqs max-num-batched-tokens "
    "max-num-scheduled-tokens mm-processor-cache-gb moe-backend num-gpu-blocks-override optimization-level "
    "override-generation-config performance-mode prefill-schedule-interval prefix-caching-hash-algo "
    "reasoning-parser response-role return-tokens-as-token-ids safetensors-load-strategy "
    "scheduler-reserve-full-isl seed skip-mm-profiling sse-keep-alive-interval stream-interval "
    "tool-call-parser tool-strict-level use-fp64-gumbel watermark "
)
TUNING = frozenset(f"--{name}" for name in _TUNING.split())
"""Flags that extraArgs may carry; of a switch, the `--no-` form too."""

OWNED = {
    "--chat-template": "the source, which carries its own template",
    "--convert": "spec.serve.task",
    "--download-dir": "spec.source",
    "--dtype": "spec.serve.engine.dtype",
    "--enable-lora": "spec.serve.adapters",
    "--enable-prefix-caching": "spec.serve.engine.prefixCaching",
    "--enforce-eager": "spec.serve.engine.enforceEager",
    "--hf-token": "spec.source.tokenSecret",
    "--kv-cache-memory-bytes": "spec.serve.engine.kvCache",
    "--lora-modules": "spec.serve.adapters",
    "--max-lora-rank": "spec.serve.adapters",
    "--max-model-len": "spec.serve.context",
    "--max-num-seqs": "spec.serve.engine.maxSequences",
    "--model": "spec.source",
    "--quantization": "spec.compress",
    "--revision": "spec.source.revision",
    "--runner": "spec.serve.task",
    "--scheduler-cls": "spec.serve.scheduler",
    "--scheduling-policy": "spec.serve.scheduler",
    "--served-model-name": "metadata.name",
    "--tensor-parallel-size": "spec.serve.engine.tensorParallel",
    "--tokenizer": "spec.source",
}
"""Flags whose meaning the manifest already has a place for."""

REFUSED = {
    "it decides who may reach the engine, which is the gateway's part": (
        "--host --port --uds --api-key --root-path --allowed-origins --allowed-methods --allowed-headers "
        "--allow-credentials --ssl-keyfile --ssl-certfile --ssl-ca-certs --ssl-cert-reqs --ssl-ciphers "
        "--enable-ssl-refresh --grpc --grpc-port --headless --data-parallel-supervisor-port --master-addr "
        "--master-port "
    ),
    "it lets requests read files or fetch addresses from inside": (
        "--allowed-local-media-path --allowed-media-domains --tool-server "
    ),
    "it lets requests hand the engine raw tensors or templates": (
        "--enable-prompt-embeds --enable-mm-embeds --trust-request-chat-template --trust-request-mm-kwargs "
    ),
    "it runs code that no stage has checked": (
        "--trust-remote-code --middleware --logits-processors --io-processor-plugin --worker-cls "
        "--worker-extension-cls --tool-parser-plugin --reasoning-parser-plugin --model-class-overrides "
        "--model-impl --distributed-executor-backend --load-format --model-loader-extra-config "
        "--pt-load-map-location --code-revision --hf-overrides --config --additional-config "
        "--compilation-config --structured-outputs-config --kv-transfer-config --ec-transfer-config "
    ),
    "it writes prompts and answers where others can read them": (
        "--enable-log-requests --enable-log-outputs --enable-log-deltas --max-log-len --logging-config "
        "--log-config-file --otlp-traces-endpoint --collect-detailed-traces --kv-events-config "
        "--profiler-config "
    ),
    "health and scaling read the engine's own counters": "--disable-log-stats ",
    "it lets requests pause or reload the engine": ("--enable-sleep-mode --weight-transfer-config --enable-scale-out "),
}
"""Flags that open the engine, by reason."""

_WHY = {flag: reason for reason, flags in REFUSED.items() for flag in flags.split()}
_NUMBER = re.compile(r"-[0-9]+(\.[0-9]+)?")


def problems_in(extra_args: list[str]) -> list[Problem]:
    """What in `serve.engine.extraArgs` may not reach vLLM, one Problem an item.

    Abbreviated and short flags are refused too, since vLLM would read them as flags that were never looked at here,
    and so is a value that belongs to no flag, which vLLM would take for another model.
    """
    problems = []
    takes_value = False
    for index, item in enumerate(extra_args):
        path = f"spec.serve.engine.extraArgs[{index}]"
        if item.startswith("-") and not _NUMBER.fullmatch(item):
            flag, has_value, _ = item.partition("=")
            problem = _problem(path, flag, bool(has_value))
            takes_value = not has_value and flag not in SWITCHES
        else:
            problem = None if takes_value else Problem(path, f"'{item}' belongs to no flag; write it as --flag={item}")
            takes_value = False
        if problem is not None:
            problems.append(problem)
    return problems


def _problem(path: str, flag: str, has_value: bool) -> Problem | None:
    """Why vLLM shall not see this flag; None when it may."""
    positive = f"--{flag[5:]}" if flag.startswith("--no-") else flag
    if flag in FLAGS and positive in TUNING:
        if has_value and flag in SWITCHES:
            return Problem(path, f"{flag} takes no value; write {flag} or --no-{positive[2:]}", suggestion=flag)
        return None
    if flag in FLAGS and positive in OWNED:
        return Problem(path, f"{flag} is what {OWNED[positive]} says; write it there", suggestion=OWNED[positive])
    if flag in FLAGS:
        reason = _WHY.get(positive, "it does more than tune the engine")
        return Problem(path, f"{flag} is refused, since {reason}; remove it")
    if not flag.startswith("--"):
        return Problem(path, f"'{flag}' is a short flag; write the long one, such as --max-num-batched-tokens=4096")
    dashed = flag.replace("_", "-")
    nearest = get_close_matches(dashed, sorted(TUNING | OWNED.keys()), n=1, cutoff=0.7)
    hint = f"; the nearest is {nearest[0]}" if nearest else "; remove it"
    message = f"{flag} is not a flag of vLLM {VLLM_VERSION}{hint}"
    return Problem(path, message, suggestion=nearest[0] if nearest else None)
