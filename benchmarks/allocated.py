"""How much memory a step takes, measured from outside and so the same for every runtime."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def most_allocated(run: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator had given out at once, above those before ``run``.

    So activations count, what a runtime keeps between the parts of a backward, messages in tensors made for them, and
    temporaries; parameters, gradients and buffers for messages do not if they are there before. Hooks on saved tensors
    would not do: under them a graph that is run in parts keeps more than without.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    total = most = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda event: event.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most
