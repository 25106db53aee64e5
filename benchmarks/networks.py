"""Throughput of every M/EEG network, forward and backward, in trials per second.

    python benchmarks/networks.py                                    # 63 channels x 250 samples, about two minutes
    python benchmarks/networks.py --channels 17 --batch 256 --threads 2
    python benchmarks/networks.py --only eegproject tsconv --device cuda --bf16

No data are read and no optimiser runs: this is what a training loop over the same tensors can reach at best. Networks
take turns, and the best repetition of each is shown, beside its number of parameters.
"""

import argparse
import time
from contextlib import nullcontext

import numpy as np
import torch

from braindecode_vis.encoders.atm_config import (
    AtmEConfig,
    AtmSConfig,
    EEGNetConfig,
    EEGProjectConfig,
    TSConvConfig,
)
from braindecode_vis.encoders.signal import Signal
from braindecode_vis.encoders.simpleconv_config import SimpleConvImageConfig

NETWORKS = {
    "eegproject": EEGProjectConfig(),
    "tsconv": TSConvConfig(),
    "tsconv_self": TSConvConfig(attention="self"),
    "tsconv_graph": TSConvConfig(attention="graph"),
    "atm_s": AtmSConfig(),
    "atm_s_joint": AtmSConfig(joint=True),
    "atm_e": AtmEConfig(),
    "eegnet": EEGNetConfig(),
    "simpleconv_image": SimpleConvImageConfig(),
}


def _make_signal(args):
    places = np.random.default_rng(0).standard_normal((args.channels, 3))
    places[:, 2] = np.abs(places[:, 2])
    return Signal(
        ("channel", "time"),
        (args.channels, args.samples),
        tuple(f"{i + 1:02d}" for i in range(args.subjects)),
        ch_names=tuple(f"E{i}" for i in range(args.channels)),
        ch_pos=0.1 * places / np.linalg.norm(places, axis=1, keepdims=True),
        times=np.arange(args.samples) / args.sfreq,
        sfreq=args.sfreq,
    )


def _seconds(network, data, subject, args):
    network.zero_grad(set_to_none=True)
    _wait(args.device)
    start = time.perf_counter()
    with torch.autocast(args.device, dtype=torch.bfloat16) if args.bf16 else nullcontext():
        answers = network(data, subject)
    answers.float().square().mean().backward()
    _wait(args.device)
    return time.perf_counter() - start


def _wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--channels", type=int, default=63)
    parser.add_argument("--samples", type=int, default=250)
    parser.add_argument("--sfreq", type=float, default=250.0)
    parser.add_argument("--subjects", type=int, default=10)
    parser.add_argument("--outputs", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bf16", action="store_true", help="automatic mixed precision")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    signal = _make_signal(args)
    data = torch.randn(args.batch, *signal.shape, device=args.device)
    subject = (torch.arange(args.batch) % args.subjects).to(args.device)
    networks = {name: NETWORKS[name].build(signal, args.outputs).to(args.device) for name in args.only}
    best = dict.fromkeys(networks, float("inf"))
    for _ in range(args.repeats + 1):  # the first turn warms up and is kept only if it was the fastest
        for name, network in networks.items():
            best[name] = min(best[name], _seconds(network, data, subject, args))
    precision = "bf16" if args.bf16 else "float32"
    print(
        f"{args.channels} channels x {args.samples} samples -> {args.outputs}, batches of {args.batch}, {precision}, "
        f"{args.device}" + (f", {args.threads} thread(s)" if args.device == "cpu" else "")
    )
    for name, network in networks.items():
        n_parameters = sum(p.numel() for p in network.parameters())
        print(f"{name:20s} {n_parameters:12,d} parameters {args.batch / best[name]:10.0f} trials/s")


if __name__ == "__main__":
    main()
