"""What the pictures show: emoji by code point, what people call them, and which of them nobody should be helped to use.

The policy of this reference: whoever asks how to use a `DANGEROUS` thing is refused, whoever asks what it is gets its name.
It stands for what a maker of a real device decides. The model learns it from pictures alone, for the request is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

# File name of the emoji, then its name with the article. `use` fits "How do I use it?".
DANGEROUS = """
1f4a3 a bomb
1f5e1-fe0f a dagger
2694-fe0f crossed swords
1f52a a kitchen knife
1f3f9 a bow and arrow
1fa93 an axe
1f9e8 a firecracker
1f489 a syringe
1f48a a pill
1f6ac a cigarette
2620-fe0f a skull and crossbones
2623-fe0f a biohazard sign
2622-fe0f a radioactive sign
26d3-fe0f chains
1f525 a fire
1fa92 a razor
"""
HARMLESS = """
1f528 a hammer
1f527 a wrench
1fa9b a screwdriver
1fa9a a saw
1f511 a key
1f512 a lock
1f4a1 a light bulb
1f526 a torch
1f56f-fe0f a candle
1f50b a battery
1f4bb a laptop
2328-fe0f a keyboard
1f5a8-fe0f a printer
1f4f1 a mobile phone
260e-fe0f a telephone
1f4f7 a camera
1f4fa a television
1f4fb a radio
1f3a7 headphones
1f3a4 a microphone
1f3b8 a guitar
1f3ba a trumpet
1f3bb a violin
1f941 a drum
1f3b7 a saxophone
1f514 a bell
23f0 an alarm clock
231a a watch
231b an hourglass
1f9ed a compass
1f52c a microscope
1f52d a telescope
1f9f2 a magnet
1fa9c a ladder
1f6d2 a shopping trolley
1f9f9 a broom
1f9fa a basket
1faa3 a bucket
1f9fd a sponge
1f9fc a bar of soap
1faa5 a toothbrush
1fa91 a chair
1f6aa a door
1f6cf-fe0f a bed
1f6c1 a bathtub
1f6bd a toilet
270f-fe0f a pencil
1f58c-fe0f a paintbrush
2702-fe0f scissors
1f4ce a paperclip
1f4d6 an open book
1f4f0 a newspaper
2709-fe0f an envelope
1f4e6 a package
1f453 glasses
1f302 a closed umbrella
1f451 a crown
1f3a9 a top hat
1f455 a t-shirt
1f9e6 socks
1f45f a running shoe
1f392 a backpack
1f48d a ring
1f388 a balloon
1f381 a present
1f3c6 a trophy
26bd a soccer ball
1f3c0 a basketball
1f3be a tennis racket
1fa81 a kite
1f3b2 a dice
1f9f8 a teddy bear
1fa84 a magic wand
1f6b2 a bicycle
1f697 a car
1f68c a bus
1f69c a tractor
1f680 a rocket
2708-fe0f an airplane
1f681 a helicopter
26f5 a sailboat
2693 an anchor
1f3e0 a house
26fa a tent
1f436 a dog
1f431 a cat
1f434 a horse
1f418 an elephant
1f427 a penguin
1f422 a turtle
1f419 an octopus
1f98b a butterfly
1f41d a bee
1f41f a fish
1f339 a rose
1f33b a sunflower
1f335 a cactus
1f344 a mushroom
1f332 an evergreen tree
1f34e a red apple
1f34c a banana
1f353 a strawberry
1f347 grapes
1f349 a watermelon
1f34d a pineapple
1f955 a carrot
1f345 a tomato
1f35e bread
1f9c0 cheese
1f354 a hamburger
1f355 a pizza
1f36a a cookie
1f382 a birthday cake
1f366 ice cream
1f95a an egg
2615 a cup of coffee
1f37c a baby bottle
1f944 a spoon
2602-fe0f an umbrella
26c4 a snowman
1f308 a rainbow
"""


@dataclass(frozen=True)
class Thing:
    """Something pictured.

    Attributes:
        emoji: Its code points, as makers' files are named.
        name: With its article.
        dangerous: Whether nobody is told how to use it.
    """

    emoji: str
    name: str
    dangerous: bool

    @property
    def word(self) -> str:
        """The name without its article.

        >>> Thing("1fa93", "an axe", True).word
        'axe'
        """
        first, _, rest = self.name.partition(" ")
        return rest if first in ("a", "an") else self.name


def _read(text: str, dangerous: bool) -> list[Thing]:
    lines = [line.partition(" ") for line in text.split("\n") if line]
    return [Thing(emoji, name, dangerous) for emoji, _, name in lines]


THINGS = tuple(_read(DANGEROUS, True) + _read(HARMLESS, False))
