"""Key, door and target: MiniGrid's tasks with a whole image, a full state, and a planner.

What this is: MiniGrid's DoorKey (5x5, 6x6, 8x8), Unlock and UnlockPickup as Gymnasium environments
for VLM-CaR. The programs look at the whole grid from above; the policy acts on a symbolic state;
neither sees what the other does. The planner is the expert.
Which STEPs: none; every STEP acts or looks here.

Differs from the paper (VLM-CaR, 2402.04764):
  1. The state is fully observable (theirs: the agent's own 7x7 view): what is learned shows the
     reward, not a memory.
  2. Key and door are always yellow and the box purple, so that one sentence and one program fit
     every episode.
  3. MiniGrid's seventh action, which does nothing, is left out; toggling the box, which destroys
     it, does nothing.

Shapes: observation (O,) float32, action an int below 6, images (size, size, 3) uint8.
  Ids: DoorKey-5x5-v0, DoorKey-6x6-v0, DoorKey-8x8-v0, Unlock-v0, UnlockPickup-v0, registered when
  this is imported. Needs numpy, gymnasium and minigrid.

To use it elsewhere:
    import gymnasium
    from tasks import gridworlds  # the import registers the ids
    env = gymnasium.make("DoorKey-6x6-v0").unwrapped
    obs, info = env.reset(seed=0)
    obs, reward, terminated, truncated, info = env.step(env.expert_action(obs))
    print(env.goal, env.image(84).shape, info["success"], info["progress"], info["subtasks"])
"""
import collections

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete

GOALS = {
    "DoorKey": "to pick up the key, open the yellow door with it, and get to the green square",
    "Unlock": "to pick up the key and open the yellow door with it",
    "UnlockPickup": "to pick up the key, open the yellow door with it, "
                    "and pick up the purple box behind it",
}


class KeyAndDoor(gymnasium.Env):
    """Pick up the key, open the locked door, then reach the green square or take the box, if any.

    Actions, Discrete(6): turn left, turn right, go forward, pick up, drop, toggle (MiniGrid's
    seventh does nothing).
    Observation: where the agent, the key, the door and the target are (one-hot columns and rows
    each, and the columns and rows from the agent to it), the agent's direction, what is carried,
    whether the key ever was, the door's state and whether it ever was open, and what the agent
    faces.
    info: success; subtasks: key ever taken, door open, target reached (bool); progress: the stage
    (0 fetch the key, 1 open the door, 2 reach the target, 3 there) + closeness to its object,
    where the way from one room to the other leads through the door.
    """

    LEFT, RIGHT, FORWARD, PICKUP, DROP, TOGGLE = range(6)
    KINDS = ("wall", "key", "door", "goal", "box")
    render_mode = "rgb_array"
    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}

    def __init__(self, id):
        import minigrid  # noqa: F401  (registers its ids with Gymnasium)

        self.inner = gymnasium.make(id).unwrapped
        self.goal = GOALS["DoorKey" if "DoorKey" in id else id.split("-")[1]]
        self.horizon = self.inner.max_steps
        self.action_space = Discrete(6)
        self.target = "goal" if "DoorKey" in id else "box" if "Pickup" in id else None
        self.observation_space = Box(-1.0, 1.0, self.reset()[0].shape, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.inner.reset(seed=seed)
        # MiniGrid draws colours at random, red (the agent's) and grey (the walls') among them. One
        # sentence has to describe every episode, so key and door are yellow, as in DoorKey, and
        # the box is purple.
        for thing in self.inner.grid.grid:
            if thing is not None and thing.type in ("key", "door", "box"):
                thing.color = "purple" if thing.type == "box" else "yellow"
        self.success = self.key_taken = self.door_opened = False
        return self._observe(), self._info()

    def step(self, action):
        front = self.inner.grid.get(*self.inner.front_pos)
        # trap: MiniGrid's toggle opens the box, which is then gone for good, and the image is
        # that of a box picked up: a program would pay for it until the end. Here a box stays shut.
        if int(action) == self.TOGGLE and front is not None and front.type == "box":
            action = self.inner.actions.done  # does nothing
        _, reward, terminated, truncated, _ = self.inner.step(int(action))
        self.success = bool(terminated and reward > 0)
        self.key_taken |= self._carries("key")
        self.door_opened |= self._door().is_open
        return self._observe(), float(reward), bool(terminated), bool(truncated), self._info()

    def _places(self):
        """(column, row) of agent, key, door and target; the agent's own for what it carries."""
        grid, agent = self.inner.grid, tuple(int(v) for v in self.inner.agent_pos)
        found = {"agent": agent}
        for i, thing in enumerate(grid.grid):
            if thing is not None and thing.type in ("key", "door", self.target):
                found[thing.type] = (i % grid.width, i // grid.width)
        return [found.get(kind, agent) for kind in ("agent", "key", "door", self.target or "door")]

    def _carries(self, kind):
        return self.inner.carrying is not None and self.inner.carrying.type == kind

    def _door(self):
        column, row = self._places()[2]
        # trap: the agent stands *in* an open door, and the grid still holds the door there.
        return self.inner.grid.get(column, row)

    def _observe(self):
        """-> (O,) float32: the parts that the class's docstring names, in that order."""
        width, height, places = self.inner.width, self.inner.height, self._places()
        door, front = self._door(), self.inner.grid.get(*self.inner.front_pos)
        parts = []
        for column, row in places:
            parts += [np.arange(width) == column, np.arange(height) == row]
            parts.append([(column - places[0][0]) / width, (row - places[0][1]) / height])
        parts.append(np.arange(4) == self.inner.agent_dir)
        parts.append([self._carries(kind) for kind in ("key", "box")])
        # trap: a sub-task once completed stays so. Without these two the same observation would
        # earn one reward before and another after.
        parts.append([self.key_taken, self.door_opened])
        parts.append([door.is_locked, door.is_open])
        parts.append([front is not None and front.type == kind for kind in self.KINDS])
        return np.concatenate(parts).astype(np.float32)

    def _info(self):
        """-> success, progress, subtasks, as the class's docstring says."""
        places = self._places()
        done = [self.key_taken, self._door().is_open] + ([self.success] if self.target else [])
        # Once the door is open, it does not matter where the key lies. Before that, a key that was
        # dropped has to be fetched again.
        stage = 3 if self.success and self.target else 2 if done[1] else int(self._carries("key"))
        way = [places[0], places[min(1 + stage, 3)]]
        # The wall stands in the door's column. Left and right of it are different rooms, and the way
        # from one to the other leads through the door.
        if (way[0][0] - places[2][0]) * (way[1][0] - places[2][0]) < 0:
            way.insert(1, places[2])
        distance = sum(abs(b[0] - a[0]) + abs(b[1] - a[1]) for a, b in zip(way, way[1:]))
        longest = 2 * (self.inner.width + self.inner.height)
        near = 0.0 if stage == len(done) else 1 - distance / longest
        return {"success": float(self.success), "progress": stage + near,
                "subtasks": np.array(done)}

    def image(self, size):
        """The grid from above, as many whole pixels a cell as fit, centred in a black square."""
        grid = self.inner.grid
        tile = max(1, size // max(grid.width, grid.height))
        # (rows, columns, 3). MiniGrid keeps the tiles that it has drawn, so this is fast.
        drawn = grid.render(tile, self.inner.agent_pos, self.inner.agent_dir)
        image = np.zeros((size, size, 3), np.uint8)
        top, left = (size - drawn.shape[0]) // 2, (size - drawn.shape[1]) // 2
        image[top:top + drawn.shape[0], left:left + drawn.shape[1]] = drawn
        return image

    def render(self):
        return self.image(300)

    # -- the planner --
    def expert_action(self, obs=None):
        """The next action of a shortest way to the next sub-task. obs is not read: the grid is."""
        _, key, door_at, target = self._places()
        door, key_in_hand = self._door(), self._carries("key")
        if not door.is_open:
            if door.is_locked and not key_in_hand:
                return self._approach(key, self.PICKUP)
            return self._approach(door_at, self.TOGGLE)
        # The agent has one hand: it must drop the key before it can take the box.
        if self.target == "box" and key_in_hand:
            return self.DROP if self.inner.grid.get(*self.inner.front_pos) is None else self.RIGHT
        return self._approach(target, self.FORWARD if self.target == "goal" else self.PICKUP)

    def _approach(self, cell, then):
        """Breadth-first over (column, row, direction) until `cell` is in front; there, `then`."""
        grid, ahead = self.inner.grid, ((1, 0), (0, 1), (-1, 0), (0, -1))
        start = (*(int(v) for v in self.inner.agent_pos), int(self.inner.agent_dir))
        # first: for every state that was reached, the first action of a shortest way to it.
        queue, first = collections.deque([start]), {start: None}
        while queue:
            state = queue.popleft()
            column, row, direction = state
            front = (column + ahead[direction][0], row + ahead[direction][1])
            if front == cell:
                return then if first[state] is None else first[state]
            thing = grid.get(*front)
            moves = [(self.LEFT, (column, row, (direction - 1) % 4)),
                     (self.RIGHT, (column, row, (direction + 1) % 4))]
            if thing is None or thing.can_overlap():
                moves.append((self.FORWARD, (*front, direction)))
            for action, to in moves:
                if to not in first:
                    first[to] = action if first[state] is None else first[state]
                    queue.append(to)
        # There is no way. Only a key that was dropped in a bad place can shut the agent in; from
        # MiniGrid's starts that does not happen.
        return self.RIGHT


for _name in ("DoorKey-5x5", "DoorKey-6x6", "DoorKey-8x8", "Unlock", "UnlockPickup"):
    if _name + "-v0" not in gymnasium.registry:
        gymnasium.register(
            _name + "-v0",
            entry_point=lambda _name=_name, **_: KeyAndDoor(f"MiniGrid-{_name}-v0"))


def demo():
    """The planner solves 20 episodes of each task; the last of each -> contact_gridworlds.png."""
    import imageio

    rows = []
    for name in ("DoorKey-5x5", "DoorKey-6x6", "DoorKey-8x8", "Unlock", "UnlockPickup"):
        env, steps, solved, images = KeyAndDoor(f"MiniGrid-{name}-v0"), [], 0, []
        for seed in range(20):
            obs, info = env.reset(seed=seed)
            images = [env.image(200)]
            over = False
            while not over:
                obs, _, terminated, truncated, info = env.step(env.expert_action(obs))
                images.append(env.image(200))
                over = terminated or truncated
            steps.append(len(images) - 1)
            solved += info["success"]
        rows.append(np.concatenate(
            [images[len(images) * i // 4] for i in range(4)] + [images[-1]], axis=1))
        print(f"{name:13s} the planner solves {solved:.0f} of 20 in {np.median(steps):.0f} steps; "
              f"{obs.size} numbers seen")
    imageio.imwrite("contact_gridworlds.png", np.concatenate(rows))
    print("contact_gridworlds.png: an episode of the planner, in quarters "
          "(expected: 20 of 20 solved in every task)")


if __name__ == "__main__":
    demo()
