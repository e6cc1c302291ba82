COUNTERS: tuple[str, ...]

class Answers:
    def counts(self) -> dict[str, int]: ...
