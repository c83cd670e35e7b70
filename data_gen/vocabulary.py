"""Word lists of the open-world caption grammar (`data_gen.grammar`).

The paper asks for objects that are "finite and solid", so that a segmenter can cut them out: no
fluids, crowds or landscapes. Attributes start with a consonant, because the paper's form is
"A photo of *a* [object]" and the attribute is the word after the article.
"""


def _words(text: str) -> tuple[str, ...]:
    """Splits a list written over several lines, entries separated by "|" or a line's end."""
    return tuple(word.strip() for word in text.replace("\n", "|").split("|") if word.strip())


THINGS = _words(
    """
    accordion|acoustic guitar|alarm clock|ambulance toy|armchair|backpack|bagpipe|ballet shoe
    banjo|bar stool|barometer|baseball glove|basketball|bass drum|bathrobe|beanie hat|beer mug
    bell|bicycle|binoculars case|birdcage|birdhouse|blender|board game box|bongo drum|bookend
    boot|bottle|bow tie|bowl|bowling pin|boxing glove|bracelet|bread basket|briefcase|brooch
    bucket|building block|bunk bed|butter dish|button jar|cabinet|cake stand|camera|camping stove
    candle holder|candlestick|candy jar|canoe|canteen flask|cap|cardigan|cash register
    cassette player|cello|ceramic owl|chair|chandelier|cheese grater|chess piece|chest of drawers
    clarinet|clog|coat|cocktail shaker|coffee grinder|coffee machine|coffee mug|coin purse
    compass|concertina|cookie jar|corkscrew|cowboy hat|crown|cuckoo clock|cup|cupboard|cushion
    cutting board|dagger|denim jacket|desk fan|desk lamp|diary|dinosaur figurine|doll
    doll house|door knocker|double bass|dress|drum|drone|dumbbell|dustpan|earring|easel
    egg cup|electric guitar|electric kettle|espresso pot|fire extinguisher|fire hydrant|fishing reel
    flashlight|floor lamp|flower pot|flute|flying disc|folding fan|football|footstool|fountain pen
    French horn|fruit bowl|frying pan|gamepad|garden gnome|gas lantern|glasses case|globe|glove
    goblet|gramophone|grandfather clock|gumball machine|hair dryer|hairbrush|hammer|handbag
    hand bell|hand drill|handheld fan|harmonica|harp|headphones stand|helmet|high chair
    high-heeled shoe|hockey mask|hockey stick|hourglass|ice bucket|ice skate|incense burner
    inkwell|iron|jack-in-the-box|jacket|jewelry box|jug|jukebox|kettle|kettlebell|key
    kick scooter|kimono|kite|knitted sweater|ladle|lampshade|lantern|laptop bag|lawn mower
    leather boot|letter opener|letter rack|life jacket|lighthouse model|loafer|locket|lunch box
    lute|magnifying glass|mailbox|mandolin|mantel clock|marionette|mask|measuring jug|medal
    megaphone|metronome|microphone|microscope|milk churn|milk jug|mirror|mitten|mixing bowl
    model airplane|model car|model rocket|model ship|model train|monocle|moped|mortar and pestle
    motorcycle|mouse trap|music box|music stand|nail clipper|napkin ring|necklace|nesting doll
    nutcracker|oboe|ocarina|office chair|oil can|oil lamp|ottoman|oven mitt|padlock|paint box
    paint bucket|paper lantern|paperweight|parasol|pencil case|pencil sharpener|pendant
    penny farthing|pepper mill|perfume bottle|phonograph|piano|picnic basket|piggy bank|pillow
    pinwheel|pipe wrench|pitcher|plate|plush bear|plush elephant|plush rabbit|pocket knife
    pocket watch|polaroid camera|porcelain cat|postcard rack|power drill|punching bag|puppet
    purse|puzzle box|quill pen|quilt|racing bike|racket|radio|rag doll|raincoat|rattle|razor
    record player|reading lamp|remote control|rice cooker|ring box|robot toy|rocking chair
    rocking horse|roller skate|rolling pin|rotary phone|rubber boot|rubber duck|rucksack|saddle
    safe|sailboat model|salt shaker|samovar|sandal|satchel|saucepan|saxophone|scale|scarf
    school bag|scooter|screwdriver|sculpture|sewing machine|shield|shoe|shopping basket|shovel
    side table|sitar|skateboard|ski boot|slipper|slot machine|snare drum|sneaker|snow globe
    soap dispenser|soccer ball|sofa|soup tureen|spinning top|spinning wheel|spoon|stapler
    statuette|steering wheel|step ladder|stool|stopwatch|straw hat|stroller|suitcase|sun hat
    sundial|surfboard|sword|table lamp|tambourine|tape dispenser|tea caddy|tea strainer|teacup
    teapot|teddy bear|telephone|telescope|tennis racket|thermos flask|thimble|tiara|tin robot
    toaster|toboggan|tool box|top hat|torch|totem carving|toy boat|toy bus|toy castle
    toy fire truck|toy piano|toy tractor|toy truck|tray|treasure chest|tricycle|trinket box
    tripod|trombone|trophy|trumpet|trunk|tuba|typewriter|ukulele|umbrella|umbrella stand
    unicycle|urn|vacuum cleaner|vase|vending machine|vinyl record|viola|violin|waffle iron
    wagon|waistcoat|walkie-talkie|walking stick|wall clock|wallet|wardrobe|watch|water bottle
    watering can|weather vane|wheelbarrow|whisk|whistle|wicker basket|wind chime|windmill model
    wine bottle|wine glass|wok|wooden duck|wooden spoon|wooden train|wreath|wristwatch|xylophone
    yo-yo|zither
    """
)

ANIMALS = _words(
    """
    alpaca|anteater|antelope|armadillo|badger|basset hound|beagle|bear cub|beaver|bobcat|boxer dog
    bull|bulldog|calf|camel|capybara|cat|chameleon|cheetah|chicken|chihuahua|chimpanzee
    chipmunk|cockatoo|collie|corgi|cow|coyote|crab|crocodile|dachshund|dalmatian|deer|donkey|dove
    duck|duckling|eagle|elephant|falcon|ferret|finch|flamingo|foal|fox|frog|gecko|giraffe|goat
    goose|gorilla|greyhound|guinea pig|hamster|hare|hedgehog|hen|heron|hippopotamus|horse|husky
    iguana|jaguar|kangaroo|kitten|koala|labrador|lamb|lemur|leopard|lion|lizard|llama|lynx|macaw
    meerkat|mole|mongoose|monkey|moose|mouse|otter|owl|ox|panda|panther|parrot|peacock|pelican
    penguin|pheasant|pig|piglet|pigeon|polar bear|pony|poodle|porcupine|puffin|pug|puppy|quail
    rabbit|raccoon|ram|raven|red panda|reindeer|retriever|rhinoceros|robin|rooster|salamander
    seal|sheep|shiba dog|skunk|sloth|snail|snow leopard|spaniel|sparrow|squirrel|stork|swan
    tabby cat|tapir|terrier|tiger|toad|tortoise|toucan|turkey|turtle|wallaby|walrus|warthog
    weasel|wolf|wolverine|wombat|woodpecker|yak|zebra
    """
)

THING_ATTRIBUTES = _words(
    """
    battered|beautifully crafted|beige|black|black and white|blue|blue and white|bright blue
    bright green|bright pink|bright red|bright yellow|bronze-coloured|brown|burgundy|carved
    checkered|chipped|chrome-plated|chunky|classic|colourful|copper-coloured|coral pink|cream
    cream and gold|crimson|cyan|dark blue|dark green|dark red|decorated|delicate|dented
    dotted|dusty|faded|fancy|flower-patterned|forest green|fuchsia|futuristic|gleaming|glittering
    glossy black|glossy white|golden|graffiti-covered|green|green and yellow|grey|hand-carved
    hand-painted|handmade|heavy|hexagonal|lacquered|large|lavender|lemon yellow|light blue
    light green|lime green|magenta|maroon|matte black|mint green|minimalist|modern|mustard yellow
    narrow|navy blue|neon green|neon pink|pale blue|pale pink|paint-splattered|patchwork|pearl white
    pink|plain|polished|polka-dot|purple|quirky|red|red and black|red and white|retro|rose gold
    round|royal blue|rust-coloured|rustic|salmon pink|scarlet|scratched|shabby|shiny|silver
    silver and blue|sky blue|sleek|small|spotted|squat|star-patterned|steel grey|striped|sturdy
    tall|tan|tartan-patterned|teal|terracotta|tiny|translucent|traditional|turquoise|two-tone
    Victorian|vintage|violet|weathered|white|white and gold|worn|yellow|zigzag-patterned
    """
)

ANIMAL_ATTRIBUTES = _words(
    """
    baby|big|black|black and white|brown|calm|cheerful|chubby|cream-coloured|curious|dark brown
    dark grey|dappled|fluffy|friendly|furry|gentle|ginger|golden|graceful|grey|grumpy|happy
    healthy|large|lean|light brown|majestic|muddy|muscular|patchy|playful|pale|proud|red-brown
    scruffy|shaggy|shy|sleepy|slender|small|spotted|striking|striped|strong|sturdy|tame|tan
    thoughtful|tiny|tired|tricoloured|wet|white|wild|wise-looking|young
    """
)

THING_POSITIONS = _words(
    """
    balanced carefully|carefully arranged|casually left|centred|displayed|displayed proudly
    facing the camera|forgotten|freshly unpacked|gently placed|half in shadow
    left alone|lit from the side|lying|lying on its side|neatly placed|perched|placed|placed alone
    posed|positioned upright|propped up|resting|resting quietly|seen from above|seen from the side
    set down|sitting|sitting alone|slightly tilted|standing|standing upright|tipped slightly
    turned to the left|turned to the right|waiting
    """
)

ANIMAL_POSITIONS = _words(
    """
    crouching|curled up|facing the camera|gazing upwards|leaning forward|lit from the side
    looking around|looking back|looking straight ahead|looking to the left|looking to the right
    lying down|lying on its side|pausing|perched|playing|posing|relaxing|resting|seen from above
    seen from the side|sitting|sitting alone|sitting upright|sleeping|standing|standing alone
    standing proudly|standing still|stretching|strolling|turning its head|waiting|waiting patiently
    walking|wandering
    """
)

SCENES = _words(
    """
    against a brick wall|against a concrete wall|against a mural|against a pale blue wall
    against a wall of ivy|amid a lavender field|amid autumn leaves|amid colourful fabric
    amid falling snow|amid fallen cherry blossoms|amid tall grass|amid wildflowers
    at a bus stop|at a campsite|at a country fair|at a farmers market|at a flea market
    at a petrol station|at a playground|at a train station|at the edge of a cliff
    at the edge of a forest|at the foot of a mountain|at the top of a hill|beneath a palm tree
    beneath a stone arch|beneath a street lamp|beneath an oak tree|beside a bonfire
    beside a bookshelf|beside a canal|beside a fountain|beside a grand piano|beside a mountain lake
    beside a railway track|beside a river|beside a stained glass window|beside a swimming pool
    beside a wooden fence|by a sunny window|by a rainy window|by the fireplace|by the sea
    in a bakery|in a bamboo grove|in a barber shop|in a barn|in a birch forest|in a boat
    in a bright studio|in a busy kitchen|in a castle courtyard|in a cathedral|in a classroom
    in a cobbled alley|in a corn field|in a cosy living room|in a dark cave|in a desert
    in a dusty attic|in a field of sunflowers|in a foggy meadow|in a garage|in a garden
    in a greenhouse|in a harbour|in a hospital corridor|in a hotel lobby|in a jungle
    in a laboratory|in a library|in a misty valley|in a museum|in a narrow hallway
    in a neon-lit street|in a park|in a patch of moss|in a pine forest|in a quiet cafe
    in a rice field|in a rock garden|in a ruined temple|in a shopping mall|in a snowy field
    in a spaceship corridor|in a stadium|in a subway station|in a supermarket aisle|in a theatre
    in a tiled bathroom|in a vineyard|in a warehouse|in a wheat field|in a workshop
    in an abandoned factory|in an apple orchard|in an art gallery|in an empty car park
    in an office|in front of a blue door|in front of a chalkboard|in front of a city skyline
    in front of a red curtain|in front of a waterfall|in front of a windmill
    in front of the pyramids|in shallow water|in the rain|in the shade of a tree
    on a balcony|on a beach towel|on a bed of straw|on a black and white tiled floor
    on a checkered blanket|on a crowded street|on a doorstep|on a fluffy rug|on a frozen lake
    on a glacier|on a grassy hill|on a gravel path|on a lace tablecloth|on a leather sofa
    on a marble counter|on a mossy rock|on a park bench|on a persian carpet|on a pier
    on a pile of books|on a polished dance floor|on a porch|on a red carpet|on a rocky shore
    on a rooftop at sunset|on a sandy beach|on a ship's deck|on a stack of crates|on a staircase
    on a stone bridge|on a tree stump|on a velvet cushion|on a volcano's slope
    on a weathered wooden table|on a wooden deck|on a wooden stage|on a workbench
    on an empty road|on the moon|on the roof of a car|on the steps of a temple|on the sidewalk
    on wet cobblestones|under a Christmas tree|under a night sky|under a rainbow|under a tent
    under bright stage lights|under northern lights|under the Eiffel Tower
    """
)
