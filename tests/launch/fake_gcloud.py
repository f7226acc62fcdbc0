"""Stands in for gcloud on PATH: records its calls, and plays a given fate.

The folder named by $FAKE_GCLOUD holds `calls.jsonl`, one list of words a call, and
`fate.json`: the states of queued resource and node, and lists that calls use up.
"""

import json
import os
import pathlib
import sys

# What may happen to `tpu_worker.sh run`; a number is its exit code.
PREEMPTED, PREEMPTED_UNSEEN = "preempted", "preempted, and shown a look later"


def main(words: list[str]) -> int:
    folder = pathlib.Path(os.environ["FAKE_GCLOUD"])
    with (folder / "calls.jsonl").open("a") as f:
        f.write(json.dumps(words) + "\n")
    file = folder / "fate.json"
    fate = json.loads(file.read_text())
    code = answer(fate, words)
    file.write_text(json.dumps(fate))
    return code


def answer(fate: dict, words: list[str]) -> int:
    assert words[:2] == ["compute", "tpus"], words
    match words[2:4]:
        case ["queued-resources", "list"]:
            if fate["lists"]:
                fate["queued"] = fate["lists"].pop(0)
            print(fate["queued"], end="\n" if fate["queued"] else "")
        case ["tpu-vm", "list"]:
            print(fate["node"])
        case ["queued-resources", "create"]:
            if fate["quota"]:
                print("ERROR: Quota limit exceeded", file=sys.stderr)
                return 1
            fate |= {"queued": "WAITING_FOR_RESOURCES", "node": "READY"}
            fate["lists"] = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
        case ["queued-resources", "delete"]:
            fate["queued"] = ""
        case ["tpu-vm", "ssh"] if "tpu_worker.sh run" in " ".join(words):
            return run(fate)
    return 0


def run(fate: dict) -> int:
    event = fate["runs"].pop(0)
    if isinstance(event, int):
        return event
    fate["lists"] = ["ACTIVE"] * (event == PREEMPTED_UNSEEN) + ["SUSPENDED"]
    return 255


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
