"""One simulated GPU without a scheduler: commands by hand, events as they leave."""

from schemas.commands import Command, Load, Register, SwapIn, SwapOut
from schemas.events import RequestEnded
from services.scheduler.inputs import Input
from services.scheduler.simulate.compute import Sequence
from services.scheduler.simulate.cost import CostModel
from services.scheduler.simulate.engine import SimReplica
from services.scheduler.simulate.gpu import SimGpu
from services.scheduler.simulate.workload import GB, ModelSize
from services.scheduler.simulate.world import START_S, ModelQueue, World

# Round figures: a prompt of n tokens takes 0.1 + n / 1000 s, a decode round of one model with one
# row 0.01 s and of every other row nothing, a swap-in 0.5 s and 1 s for every 10 GB.
COST = CostModel(
    link_bytes_per_s=10e9,
    swap_fixed_s=0.5,
    swap_out_s=0.25,
    suspend_s=0.5,
    prefill_fixed_s=0.1,
    prefill_s_per_token=0.001,
    prefill_chunk_tokens=1000,
    decode_fixed_s=0.01,
    decode_s_per_row=0.0,
    kv_bytes_per_token=1_000_000,
    load_bytes_per_s=1e9,
    register_s=0.1,
)
SIZE = ModelSize(10 * GB, 1 * GB, max_batch=4)


class Rig:
    """A GPU of 25 GB: two models of `SIZE` fit, three do not. Times count from 0."""

    def __init__(self, *models: str, cost: CostModel = COST, memory_bytes: int = 25 * GB) -> None:
        self.world = World({model: ModelQueue(model, SIZE) for model in models})
        self.world.tell = self._note
        self.world.end_of = lambda _sequence, _model: None
        self.gpu = SimGpu(self.world, "gpu0", memory_bytes, cost)
        self.events: list[tuple[float, Input]] = []
        self._generation = 0

    def _note(self, event: Input) -> None:
        self.events.append((round(self.world.now - START_S, 6), event))

    def replica(self, model: str) -> SimReplica:
        return self.gpu.replicas[model]

    def names(self, since: int = 0) -> list[str]:
        """Kinds of events and when they came."""
        return [f"{at:g} {type(event).__name__}" for at, event in self.events[since:]]

    def ended(self) -> dict[str, float]:
        """When requests ended."""
        return {e.request_id: at for at, e in self.events if isinstance(e, RequestEnded)}

    def until(self, at_s: float) -> None:
        """Let everything up to ``at_s`` happen."""
        heap = self.world.heap
        while heap and heap[0][0] <= START_S + at_s + 1e-9:
            entry = heap[0]
            heap.remove(entry)
            heap.sort()
            self.world.now = entry[0]
            entry[2](entry[3])
            self.gpu.validate()
        self.world.now = START_S + at_s

    def _give(self, command: Command) -> None:
        self.world.num_moving += 1
        self.gpu.accept(command)
        self.gpu.validate()

    def swap_in(self, model: str) -> None:
        self._generation += 1
        self._give(SwapIn("gpu0", model, 1, self._generation))

    def swap_out(self, model: str, preempt: bool = False) -> None:
        self._generation += 1
        self._give(SwapOut("gpu0", model, 1, self._generation, preempt=preempt))

    def load(self, model: str) -> None:
        self._generation += 1
        self._give(Load("gpu0", model, 1, self._generation))

    def register(self, model: str) -> None:
        self._generation += 1
        self._give(Register("gpu0", model, 1, self._generation, self.replica(model).queue.spec))

    def request(self, name: str, model: str, num_in: int, num_out: int) -> None:
        """It enters the queue, and is started if there is a place for it."""
        replica = self.replica(model)
        sequence = Sequence(len(self.events), name, self.world.now, num_in, num_out)
        replica.queue.waiting.append(sequence)
        replica.queue.num_open += 1
        self.world.num_queued += 1
        if replica.state == "resident" and self.gpu.engine.may_start(replica, sequence):
            self.gpu.engine.start_now(replica)
        self.gpu.validate()
