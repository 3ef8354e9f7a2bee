"""Labels by people: what they are shown, how their answers are kept, how far they agree."""
