"""Labels by people: batches, terminal and Label Studio, stored labels, agreement."""
