"""Places the actors that hold a run's own state on the node of its driver, whose death ends the run anyway.

On another node, the loss of that node would lose the count of calls in flight or the list of engines, and so end a
stage that could have continued.
"""

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def beside_driver() -> NodeAffinitySchedulingStrategy:
    """The scheduling strategy for an actor that needs no CPU. Only the driver may call this."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
