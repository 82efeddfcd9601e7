"""Where the actors run that hold a run's own state: on the node of its driver, whose death ends the run anyway.

Elsewhere a node that goes away would take along the count of calls in flight, or the list of engines, and with it a
stage that could go on.
"""

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def beside_driver() -> NodeAffinitySchedulingStrategy:
    """The scheduling strategy of an actor that needs no CPU; for the driver to call."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
