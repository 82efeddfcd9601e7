"""Actors with a run's state are placed on the driver's node, whatever other nodes the cluster has."""

import ray

from operators.driver_node import beside_driver


class Where:
    def node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())


def test_an_actor_is_on_the_node_of_the_driver_and_nowhere_else(local_ray: None) -> None:
    here = ray.get_runtime_context().get_node_id()
    actor = ray.remote(num_cpus=0)(Where).options(scheduling_strategy=beside_driver()).remote()
    assert ray.get(actor.node.remote()) == here
    assert (beside_driver().node_id, beside_driver().soft) == (here, False)
    ray.kill(actor)
