"""Words and sentences that the documents of tasks are made of: nothing has to be fetched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count, cycle
from random import Random

NOUNS = tuple(
    """
    acorn almond anchor anvil apple apron arch arrow aster autumn axle badge bagel bakery balcony bamboo banner
    barge barley barrel basin basket bead beacon beaver bell bench berry bicycle birch biscuit blanket blossom boat
    bolt bonnet boot bottle boulder branch brass bread brick bridge broom brush bucket bugle bundle butter button
    cabin cable cactus camel candle canoe canvas canyon cape caravan card carpet carrot castle cedar cellar chain
    chair chalk cherry chestnut chimney chisel cider cinder clay cliff clock cloud clover coast cobble coin comb
    compass copper coral cotton crane crate crayon creek cricket crown crystal cup curtain cushion daisy deer desk
    dome donkey drawer drum dune eagle easel elbow elm ember engine envelope falcon feather fence fern fiddle fig
    finch flag flask flint flour flute fog forge fountain fox funnel gallery garlic gate ginger glacier glass globe
    glove goose grain granite grape gravel hammer hammock harbor harp hatch hazel hedge helmet heron hinge honey
    hood hook horn hose hut ink iron island ivory ivy jar jasmine jewel jug juniper kettle key kite knot ladder
    ladle lagoon lamp lantern lark lemon lever lilac lime linen lock locket loom lumber magnet mallet mango map
    maple marble marsh mast mat meadow medal melon mill mint mirror mitten moat moss moth mug mustard nail napkin
    needle nest nickel nutmeg oak oar oat olive onion opal orchard otter oven owl paddle pail palm panel paper
    parcel parrot path peach pear pearl pebble pencil pepper piano pickle pier pigeon pillar pillow pine pipe
    pistachio plank plate plow plum pocket pond poppy porch pottery prism pulley pumpkin puzzle quarry quill quilt
    rabbit radish raft rail raisin rake raven reed ribbon rice ridge ring river robin rocket rod roof rope rose ruby
    rudder saddle saffron sail salt sand sandal satin saucer scarf scissors seed shed shell shield shovel silk
    silver slate sled sleeve slope smoke snail soap sock spade spark sparrow spice spider spindle sponge spoon
    spruce squash stable staple steam stone stool stove straw string sugar swan table tailor tambourine teapot tent
    thimble thistle thread thunder tile timber toast torch towel tower trail tray trumpet tulip tunnel turnip turtle
    umbrella valley vase velvet vine violet violin wagon walnut wave wax whale wheat wheel whistle willow window
    wool wreath zinc
    """.split()
)
ADJECTIVES = tuple(
    """
    amber ancient azure bitter blunt bold brave brief bright brisk broad calm clean clear clever cold cool crisp
    curly damp dark deep dense dim dry dusty early eager empty faint fair famous fine firm flat fond fresh frosty
    gentle giant glad golden grand gray green handy happy hard heavy hidden high hollow hot humble idle keen kind
    large late lazy light little lively lonely long loose loud lucky mellow mild misty modest muddy narrow neat new
    noble odd old pale patient plain polite proud quick quiet rapid rare red rich rough round rusty scarlet sharp
    shiny short shy silent simple sleepy slim slow small smooth soft solid sour square steady steep stiff still
    strange strong sturdy sunny sweet swift tall tame tender thick thin tidy tiny tired warm weary wet white wide
    wild wise wooden yellow young
    """.split()
)
_VERBS = "stood lay rested waited leaned gleamed rattled drifted turned fell".split()
_PREPOSITIONS = "near behind beside above under against before beyond".split()

PEOPLE = "Amos Bertha Clara Dexter Edith Felix Greta Hugo".split()
PLACES = "kitchen garden attic library garage bathroom hallway office bedroom school park museum".split()

# The noise of RULER (Hsieh et al., 2024) and of the passkey task before it (Mohtashami and Jaggi, 2023).
NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)


def noise() -> Iterator[str]:
    """The same five sentences over and over."""
    return cycle(NOISE)


def prose(random: Random) -> Iterator[str]:
    """Sentences that no other need be like: "The brisk lantern waited beside a tame violin." They hold no digit, and no
    name of `PEOPLE` and `PLACES`."""
    while True:
        first, second = random.sample(NOUNS, 2)
        one, other = random.sample(ADJECTIVES, 2)
        verb, where = random.choice(_VERBS), random.choice(_PREPOSITIONS)
        yield f"The {one} {first} {verb} {where} {'an' if other[0] in 'aeiou' else 'a'} {other} {second}."


def distinct_words(nouns: Sequence[str]) -> Iterator[str]:
    """The nouns, and when these are used up, compounds with adjectives before them: "amber-anchor"; without end."""
    yield from nouns
    for depth in count(1):
        for number in range(len(ADJECTIVES) ** depth):
            parts, rest = [], number
            for _ in range(depth):
                rest, digit = divmod(rest, len(ADJECTIVES))
                parts.append(ADJECTIVES[digit])
            yield from ("-".join([*parts, noun]) for noun in nouns)
