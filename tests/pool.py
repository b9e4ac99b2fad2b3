"""Worker processes that stay alive over many tests: process start and imports cost more than most tests."""

from __future__ import annotations

import gc
import os
import socket
import traceback

import torch.multiprocessing as mp


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(rank: int, world: int, port: int, connection) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
        DS_ACCELERATOR="cpu",
    )
    import torch

    torch.set_num_threads(1)
    import logging

    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed("gloo")
    gc.freeze()  # what the imports leave is no garbage: each rebuild collects, and would look through it again
    while True:
        message = connection.recv()
        if message is None:
            break
        function, args = message
        try:
            torch.distributed.barrier()
            connection.send((True, function(*args)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
    torch.distributed.destroy_process_group()
    gc.unfreeze()


class RankPool:
    """`world` gloo ranks; `run` sends a module-level function to all and collects the answers in rank order."""

    def __init__(self, world: int):
        context = mp.get_context("spawn")
        port = free_port()
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, port, theirs), daemon=False)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function, *args, timeout: float = 1200):
        for pipe in self.pipes:
            pipe.send((function, args))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(timeout):
                self.close(force=True)
                raise TimeoutError(f"rank {rank} did not answer in {timeout} s")
            try:
                answers.append(pipe.recv())
            except EOFError as error:
                self.close(force=True)
                raise RuntimeError(f"rank {rank} died") from error
        failed = [text for ok, text in answers if not ok]
        if failed:
            raise RuntimeError("\n".join(failed))
        return [value for _, value in answers]

    def close(self, force: bool = False) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if force:
                process.kill()
            elif process.is_alive():
                pipe.send(None)
        for process in self.processes:
            process.join(20)
            if process.is_alive():
                process.kill()
