"""Tries a chat template once in a process with little time and memory.

A template is a program of the model's author. Its sandbox protects everything but time and memory.
"""

import json
import subprocess
import sys

from runtime.core.errors import ModelRefused

CPU_LIMIT_S, WALL_LIMIT_S = (
    1,
    60,
)  # WALL_LIMIT_S is for a busy machine
MAX_MEMORY_BYTES = 1 << 30  # beyond what Python itself takes
MAX_OUTPUT_CHARS = 1 << 20  # for two short conversations

# A template may refuse roles or their order. SIGXCPU ends a process that exceeds its time.
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
    """Raise ModelRefused if a template (one, or several by name) exceeds its time and memory.

    The check takes a second or two if there is a template. A malicious template may still behave
    well only during the check.
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
