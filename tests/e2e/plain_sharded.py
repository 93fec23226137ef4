"""A script that shards its network over two processes, which someone else starts."""

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset


class LitSharded(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 33), nn.ReLU(), nn.Linear(33, 3))

    def configure_model(self) -> None:
        mesh = self.device_mesh
        assert mesh is not None
        fully_shard(self.net, mesh=mesh["data_parallel"])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        points, labels = batch
        return nn.functional.cross_entropy(self.net(points), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    L.seed_everything(1)
    points = torch.randn(256, 16)
    data = TensorDataset(points, points[:, :3].argmax(dim=1))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        max_epochs=1,
        log_every_n_steps=5,
        logger=CSVLogger("."),
    )
    model = LitSharded()
    trainer.fit(model, DataLoader(data, batch_size=16))
    parameters = {
        name: shard.full_tensor()
        for name, shard in model.state_dict().items()
        if isinstance(shard, DTensor)
    }
    if trainer.is_global_zero:
        torch.save(parameters, "parameters.pt")


if __name__ == "__main__":
    main()
