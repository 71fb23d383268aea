"""What happens on the optimizer's side, as optax transformations."""

from peftjax.training.allocator import RankAllocatorState as RankAllocatorState
from peftjax.training.allocator import prune as prune
from peftjax.training.allocator import rank_allocator as rank_allocator
from peftjax.training.allocator import ranks as ranks
