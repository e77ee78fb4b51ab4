"""What a bundle shows to others than its makers: signatures, and evidence in the formats that their tools read."""
