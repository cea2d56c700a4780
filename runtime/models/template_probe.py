"""A chat template is a program of the model's author. It runs in a sandbox that keeps it from everything but time and memory; here
it is tried out once, in a process of its own that has little of both."""

import json
import subprocess
import sys

from runtime.core.errors import ModelRefused

CPU_LIMIT_S, WALL_LIMIT_S = (
    1,
    60,
)  # seconds; the second for a machine that is too busy to give the first
MAX_MEMORY_BYTES = 1 << 30  # bytes, beyond what Python itself takes
MAX_OUTPUT_CHARS = 1 << 20  # characters of the text of two short conversations

# What a template refuses (roles, their order) is its own affair. SIGXCPU ends a process that is over its time.
PROBE_PROGRAM = f"""
import json, resource, sys
from transformers.utils.chat_template_utils import render_jinja_template as render
templates = json.load(sys.stdin)
talk = [{{"role": role, "content": "Hello."}} for role in ("system", "user", "assistant", "user")]
spent = resource.getrusage(resource.RUSAGE_SELF)
limit = int(spent.ru_utime + spent.ru_stime) + 1 + {CPU_LIMIT_S}
resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + {MAX_MEMORY_BYTES},) * 2)
for template in templates:
    for messages in (talk, talk[1:]):
        try:
            texts, _ = render([messages], chat_template=template, add_generation_prompt=True)
        except MemoryError:
            sys.exit(3)
        except Exception:
            continue
        if len(texts[0]) > {MAX_OUTPUT_CHARS}:
            sys.exit(3)
"""


def check_template(template: str | dict[str, str] | None, name: str) -> None:
    """Raises ModelRefused where a template (one, or several by name) does not come to an end within its time and memory.

    It takes a second or two, where there is a template at all. A template may still behave only until it is asked for real.
    """
    if not template:
        return
    templates = [template] if isinstance(template, str) else list(template.values())
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", PROBE_PROGRAM],
            input=json.dumps(templates),
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=WALL_LIMIT_S,
            check=False,
        )
        ended = done.returncode == 0
    except subprocess.TimeoutExpired:
        ended = False
    if not ended:
        raise ModelRefused(
            f"{name} has a chat template that does not end within {CPU_LIMIT_S} s and "
            f"{MAX_MEMORY_BYTES >> 30} GiB: remove it, or choose another model"
        )
