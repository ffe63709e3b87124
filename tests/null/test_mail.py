"""Room for messages is taken again when nobody refers to it any more, and never before."""

import torch

from meshwright.runtime.mail import Room


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_room_is_taken_again() -> None:
    room = Room(torch.device("cpu"))
    first = room.take((4, 8), torch.float32)
    where = address(first)
    other = room.take((4, 8), torch.float32)
    assert address(other) != where
    del first
    assert address(room.take((4, 8), torch.float32)) == where
    assert room.take((8, 4), torch.float64).shape == (8, 4)
    assert len(room.known[(4, 8), torch.float32]) == 2


def test_what_autograd_or_a_script_keeps_is_not_written_over() -> None:
    room = Room(torch.device("cpu"))
    received = room.take((3,), torch.float64).requires_grad_()
    where = address(received)
    loss = received.square().sum()
    view = received.detach()[1:]
    del received
    assert address(room.take((3,), torch.float64)) != where  # saved for the backward
    del loss
    assert address(room.take((3,), torch.float64)) != where  # seen through a view
    del view
    assert where in {address(one) for one in [room.take((3,), torch.float64), room.take((3,), torch.float64)]}
    room.clear()
    assert not room.known
