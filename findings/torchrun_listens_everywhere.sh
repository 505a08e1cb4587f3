#!/usr/bin/env bash
# torch 2.13: `torchrun --rdzv-endpoint 127.0.0.1:0 --local-addr 127.0.0.1` listens on every address of the machine.
#
# One would have guessed: a rendezvous whose endpoint, and whose node's address, is 127.0.0.1 is reached from this
# machine alone. But TCPStore takes the address for its clients only; its server listens on [::]. There are two of them
# (one for the agents, one for the ranks), and with --standalone and --rdzv-backend static it is the same.
#
# Whom it hurts: everybody who trains on a machine with an open network. The store has no login. Who reaches its port can
# read and write it: end the run, or name another address for a rank, which then talks to that one; object collectives
# (broadcast_object_list, all_gather_object) unpickle what they get. A TCPStore with master_listen_fd, the descriptor of
# a socket that is bound to 127.0.0.1, listens there alone.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6 psutil==7.2.2
cat > "$folder/rank.py" <<'PY'
import os, socket
import psutil, torch
import torch.distributed as dist

def listens(process):
    return sorted({c.laddr.ip for c in process.net_connections() if c.status == psutil.CONN_LISTEN})

agent = psutil.Process().parent()
found = listens(agent)
print("torch", torch.__version__, "MASTER_ADDR", os.environ["MASTER_ADDR"], "the agent listens on", found)
with socket.create_server(("127.0.0.1", 0)) as bound:
    own = dist.TCPStore("127.0.0.1", bound.getsockname()[1], is_master=True, wait_for_workers=False,
                        master_listen_fd=bound.detach())
print("with master_listen_fd this process listens on", listens(psutil.Process()))
raise SystemExit(0 if found == ["::"] and listens(psutil.Process()) == ["127.0.0.1"] else 1)
PY
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -m torch.distributed.run --nnodes 1 --nproc-per-node 1 \
  --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 --local-addr 127.0.0.1 "$folder/rank.py"
