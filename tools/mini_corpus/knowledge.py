# SPDX-License-Identifier: Apache-2.0
"""General-knowledge tables of the small training corpus.

Every table holds widely known facts. A :class:`Relation` joins one table column to the wordings
in which the facts are taught (statements, questions) and to the multiple-choice subject under
which they are examined.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """One kind of fact, as pairs of a key and its value.

    Attributes:
        name: Short identifier.
        subject: Multiple-choice subject the relation belongs to.
        statements: Sentences with ``{k}`` (key) and ``{v}`` (value).
        questions: Questions with ``{k}`` whose answer is the value.
        rows: The facts, ``(key, value)``.
        check: Lower-case yes/no question with ``{k}`` and ``{v}``, or empty.
    """

    name: str
    subject: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    rows: tuple[tuple[str, str], ...]
    check: str = ""

    def values(self) -> list[str]:
        """Return the distinct values in a fixed order."""
        return sorted({value for _, value in self.rows})


def _table(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()]


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    return tuple((row[0], row[1]) for row in _table(text))


# country | capital | continent | main language
_COUNTRIES = _table("""
France|Paris|Europe|French
Germany|Berlin|Europe|German
Italy|Rome|Europe|Italian
Spain|Madrid|Europe|Spanish
Portugal|Lisbon|Europe|Portuguese
England|London|Europe|English
Ireland|Dublin|Europe|English
Greece|Athens|Europe|Greek
Sweden|Stockholm|Europe|Swedish
Norway|Oslo|Europe|Norwegian
Finland|Helsinki|Europe|Finnish
Denmark|Copenhagen|Europe|Danish
Poland|Warsaw|Europe|Polish
Austria|Vienna|Europe|German
Hungary|Budapest|Europe|Hungarian
Russia|Moscow|Europe|Russian
Ukraine|Kyiv|Europe|Ukrainian
Romania|Bucharest|Europe|Romanian
Iceland|Reykjavik|Europe|Icelandic
China|Beijing|Asia|Chinese
Japan|Tokyo|Asia|Japanese
South Korea|Seoul|Asia|Korean
India|New Delhi|Asia|Hindi
Thailand|Bangkok|Asia|Thai
Vietnam|Hanoi|Asia|Vietnamese
Turkey|Ankara|Asia|Turkish
Iran|Tehran|Asia|Persian
Iraq|Baghdad|Asia|Arabic
Nepal|Kathmandu|Asia|Nepali
Mongolia|Ulaanbaatar|Asia|Mongolian
Egypt|Cairo|Africa|Arabic
Kenya|Nairobi|Africa|Swahili
Nigeria|Abuja|Africa|English
Ethiopia|Addis Ababa|Africa|Amharic
Morocco|Rabat|Africa|Arabic
Ghana|Accra|Africa|English
Senegal|Dakar|Africa|French
Canada|Ottawa|North America|English
Mexico|Mexico City|North America|Spanish
Cuba|Havana|North America|Spanish
Jamaica|Kingston|North America|English
Brazil|Brasilia|South America|Portuguese
Argentina|Buenos Aires|South America|Spanish
Chile|Santiago|South America|Spanish
Peru|Lima|South America|Spanish
Colombia|Bogota|South America|Spanish
Australia|Canberra|Oceania|English
New Zealand|Wellington|Oceania|English
""")

# landmark | city
_LANDMARKS = _pairs("""
the Eiffel Tower|Paris
the Colosseum|Rome
Big Ben|London
the Statue of Liberty|New York
the Parthenon|Athens
the Brandenburg Gate|Berlin
the Forbidden City|Beijing
the Golden Gate Bridge|San Francisco
the Sydney Opera House|Sydney
the Kremlin|Moscow
the Blue Mosque|Istanbul
the White House|Washington
the Prado Museum|Madrid
the Little Mermaid|Copenhagen
""")

BOOKS = _pairs("""
Hamlet|Shakespeare
One Hundred Years of Solitude|Gabriel Garcia Marquez
Don Quixote|Miguel de Cervantes
War and Peace|Leo Tolstoy
Crime and Punishment|Fyodor Dostoevsky
Pride and Prejudice|Jane Austen
Great Expectations|Charles Dickens
Moby Dick|Herman Melville
The Odyssey|Homer
The Divine Comedy|Dante Alighieri
Faust|Johann Wolfgang von Goethe
Les Miserables|Victor Hugo
Madame Bovary|Gustave Flaubert
The Three Musketeers|Alexandre Dumas
Frankenstein|Mary Shelley
Dracula|Bram Stoker
Jane Eyre|Charlotte Bronte
Wuthering Heights|Emily Bronte
Treasure Island|Robert Louis Stevenson
The Jungle Book|Rudyard Kipling
The Time Machine|H. G. Wells
The Adventures of Tom Sawyer|Mark Twain
Alice in Wonderland|Lewis Carroll
Ulysses|James Joyce
The Metamorphosis|Franz Kafka
The Great Gatsby|F. Scott Fitzgerald
The Old Man and the Sea|Ernest Hemingway
The Grapes of Wrath|John Steinbeck
Nineteen Eighty-Four|George Orwell
Brave New World|Aldous Huxley
The Hobbit|J. R. R. Tolkien
The Little Prince|Antoine de Saint-Exupery
The Stranger|Albert Camus
To Kill a Mockingbird|Harper Lee
Things Fall Apart|Chinua Achebe
Beloved|Toni Morrison
The Name of the Rose|Umberto Eco
The House of the Spirits|Isabel Allende
Robinson Crusoe|Daniel Defoe
Gulliver's Travels|Jonathan Swift
""")

_WORKS = _pairs("""
the Mona Lisa|Leonardo da Vinci
The Starry Night|Vincent van Gogh
The Scream|Edvard Munch
Guernica|Pablo Picasso
Girl with a Pearl Earring|Johannes Vermeer
The Night Watch|Rembrandt
The Persistence of Memory|Salvador Dali
The Kiss|Gustav Klimt
The Birth of Venus|Sandro Botticelli
Water Lilies|Claude Monet
""")

_INVENTIONS = _pairs("""
the telephone|Alexander Graham Bell
the theory of relativity|Albert Einstein
the law of gravity|Isaac Newton
radium|Marie Curie
penicillin|Alexander Fleming
the theory of evolution|Charles Darwin
the printing press|Johannes Gutenberg
the light bulb|Thomas Edison
dynamite|Alfred Nobel
the airplane|the Wright brothers
the World Wide Web|Tim Berners-Lee
the periodic table|Dmitri Mendeleev
""")

# animal | class | young
_ANIMALS = _table("""
dog|mammal|puppy
cat|mammal|kitten
cow|mammal|calf
horse|mammal|foal
sheep|mammal|lamb
goat|mammal|kid
pig|mammal|piglet
bear|mammal|cub
deer|mammal|fawn
kangaroo|mammal|joey
whale|mammal|
bat|mammal|
dolphin|mammal|
elephant|mammal|
duck|bird|duckling
goose|bird|gosling
swan|bird|cygnet
owl|bird|owlet
chicken|bird|chick
eagle|bird|eaglet
penguin|bird|
ostrich|bird|
parrot|bird|
shark|fish|
salmon|fish|
trout|fish|
tuna|fish|
snake|reptile|
lizard|reptile|
crocodile|reptile|
turtle|reptile|
frog|amphibian|tadpole
toad|amphibian|
newt|amphibian|
bee|insect|larva
ant|insect|
butterfly|insect|caterpillar
mosquito|insect|
""")

_BODY = _pairs("""
pumps blood around the body|the heart
takes in oxygen from the air|the lungs
lets us think and remember|the brain
digests food with acid|the stomach
cleans the blood and makes urine|the kidneys
protects the body from outside|the skin
lets us see light|the eyes
lets us hear sound|the ears
makes bile and stores sugar|the liver
carries oxygen in the blood|red blood cells
makes food from light in a leaf|chlorophyll
holds the genes of a cell|the nucleus
gives a cell its energy|the mitochondria
""")

_ELEMENTS = _pairs("""
hydrogen|H
helium|He
lithium|Li
carbon|C
nitrogen|N
oxygen|O
fluorine|F
neon|Ne
sodium|Na
magnesium|Mg
aluminium|Al
silicon|Si
phosphorus|P
sulfur|S
chlorine|Cl
potassium|K
calcium|Ca
iron|Fe
nickel|Ni
copper|Cu
zinc|Zn
silver|Ag
tin|Sn
iodine|I
gold|Au
mercury|Hg
lead|Pb
uranium|U
""")

_RELIGION_BOOKS = _pairs("""
Christianity|the Bible
Islam|the Quran
Judaism|the Torah
Hinduism|the Vedas
Buddhism|the Tripitaka
Sikhism|the Guru Granth Sahib
Taoism|the Tao Te Ching
Zoroastrianism|the Avesta
""")

_RELIGION_PLACES = _pairs("""
Christianity|a church
Islam|a mosque
Judaism|a synagogue
Hinduism|a mandir
Buddhism|a pagoda
Sikhism|a gurdwara
Shinto|a shrine
Zoroastrianism|a fire temple
""")

_NUMBERS = _pairs("""
days are there in a week|7
months are there in a year|12
hours are there in a day|24
minutes are there in an hour|60
seconds are there in a minute|60
days are there in a leap year|366
weeks are there in a year|52
years are there in a century|100
years are there in a decade|10
continents are there on Earth|7
oceans are there on Earth|5
planets are there in the solar system|8
legs does a spider have|8
legs does an insect have|6
legs does a dog have|4
sides does a triangle have|3
sides does a hexagon have|6
sides does a pentagon have|5
players are there in a football team|11
strings does a violin have|4
letters are there in the English alphabet|26
bits are there in a byte|8
centimetres are there in a metre|100
metres are there in a kilometre|1000
degrees are there in a right angle|90
degrees are there in a circle|360
colours are there in a rainbow|7
""")

_OPPOSITES = _pairs("""
hot|cold
big|small
fast|slow
early|late
full|empty
hard|soft
high|low
light|dark
long|short
new|old
open|closed
rich|poor
right|wrong
strong|weak
wet|dry
young|old
happy|sad
loud|quiet
clean|dirty
first|last
day|night
up|down
war|peace
love|hate
""")

_SPACE = _pairs("""
is the closest planet to the Sun|Mercury
is the largest planet of the solar system|Jupiter
is famous for its bright rings|Saturn
is called the red planet|Mars
is our home planet|Earth
is the farthest planet from the Sun|Neptune
is the hottest planet of the solar system|Venus
spins on its side|Uranus
is the star of our solar system|the Sun
goes around the Earth|the Moon
is the galaxy we live in|the Milky Way
""")

_EXTREMES = _pairs("""
the highest mountain in the world|Mount Everest
the largest ocean in the world|the Pacific Ocean
the largest country in the world|Russia
the smallest country in the world|Vatican City
the longest river of Africa|the Nile
the largest river of South America|the Amazon
the longest river of Asia|the Yangtze
the longest river of Europe|the Volga
the largest hot desert in the world|the Sahara
the largest continent|Asia
the coldest continent|Antarctica
the largest island in the world|Greenland
the highest mountain of Africa|Kilimanjaro
the highest mountain of the Alps|Mont Blanc
the deepest lake in the world|Lake Baikal
""")

# term | definition
TERMS = _pairs("""
an algorithm|a list of steps for solving a problem
a variable|a name that stands for a value in a program
a loop|a part of a program that repeats
a function|a named piece of code that can be called
a compiler|a program that turns source code into machine code
an operating system|the software that manages the computer
a database|an organised collection of data
a bug|a mistake in a program
a network|a group of computers joined together
a password|a secret word that protects an account
a browser|a program for reading web pages
a byte|a group of eight bits
a keyboard|a device for typing text into a computer
a processor|the chip that carries out instructions
a file|a named piece of stored data
a robot|a machine that can act by itself
a neural network|a model made of layers of simple connected units
a token|a small piece of text that a language model reads
training|the process of fitting a model to data
overfitting|learning the training data too closely
a language model|a model that predicts the next word of a text
a data set|a collection of examples for training or testing
a label|the right answer that belongs to an example
the learning rate|the size of each step during training
gradient descent|a method that lowers the loss step by step
a loss function|a measure of how wrong a model is
""")

_FOUNDERS = _pairs("""
Microsoft|Bill Gates
Amazon|Jeff Bezos
Apple|Steve Jobs
Facebook|Mark Zuckerberg
Google|Larry Page
Ford|Henry Ford
Ikea|Ingvar Kamprad
Tesla Motors|Martin Eberhard
""")

_CEOS = _pairs("""
Google|Sundar Pichai
Microsoft|Satya Nadella
NVIDIA|Jensen Huang
""")


def _article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _column(table: list[list[str]], index: int) -> tuple[tuple[str, str], ...]:
    return tuple((row[0], row[index]) for row in table if row[index])


def _swap(rows: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    return tuple((value, key) for key, value in rows)


GEOGRAPHY = "high_school_geography"
BIOLOGY = "high_school_biology"
CHEMISTRY = "high_school_chemistry"
COMPUTING = "high_school_computer_science"
RELIGIONS = "world_religions"
GLOBAL = "global_facts"
MISC = "miscellaneous"

RELATIONS: tuple[Relation, ...] = (
    Relation(
        "capital",
        GEOGRAPHY,
        ("The capital of {k} is {v}.", "{v} is the capital of {k}."),
        ("What is the capital of {k}?", "Which city is the capital of {k}?"),
        _column(_COUNTRIES, 1),
        "is {v} the capital of {k}",
    ),
    Relation(
        "capital_of",
        GEOGRAPHY,
        ("{k} is the capital of {v}.",),
        ("{k} is the capital of which country?",),
        _swap(_column(_COUNTRIES, 1)),
    ),
    Relation(
        "continent",
        GEOGRAPHY,
        ("{k} is a country in {v}.", "{k} is in {v}."),
        ("Which continent is {k} in?", "Where is {k}?"),
        _column(_COUNTRIES, 2),
        "is {k} a country in {v}",
    ),
    Relation(
        "language",
        MISC,
        ("People in {k} speak {v}.", "The main language of {k} is {v}."),
        ("What language do people speak in {k}?", "What is the main language of {k}?"),
        _column(_COUNTRIES, 3),
        "do people in {k} speak {v}",
    ),
    Relation(
        "landmark",
        GEOGRAPHY,
        ("You can visit {k} in {v}.", "You will find {k} in {v}."),
        ("In which city is {k}?",),
        _LANDMARKS,
        "can you visit {k} in {v}",
    ),
    Relation(
        "extreme",
        GLOBAL,
        ("{v} is {k}.",),
        ("What is {k}?",),
        _EXTREMES,
        "is {v} {k}",
    ),
    Relation(
        "author",
        MISC,
        ("{k} was written by {v}.", "{v} wrote {k}.", "The author of {k} is {v}."),
        ("Who wrote {k}?", "Who is the author of {k}?"),
        BOOKS,
        "did {v} write {k}",
    ),
    Relation(
        "book",
        MISC,
        ("{k} wrote {v}.",),
        ("Which book was written by {k}?",),
        _swap(BOOKS),
    ),
    Relation(
        "artist",
        MISC,
        ("{k} was painted by {v}.", "{v} painted {k}."),
        ("Who painted {k}?",),
        _WORKS,
        "did {v} paint {k}",
    ),
    Relation(
        "inventor",
        MISC,
        ("{k} is linked with the name of {v}.", "We remember {v} for {k}."),
        ("Whose name is linked with {k}?", "Who is remembered for {k}?"),
        _INVENTIONS,
        "do we remember {v} for {k}",
    ),
    Relation(
        "class",
        BIOLOGY,
        ("{k} is {v}.",),
        ("What kind of animal is {k}?",),
        tuple((_article(k), _article(v)) for k, v in _column(_ANIMALS, 1)),
        "is {k} {v}",
    ),
    Relation(
        "young",
        BIOLOGY,
        ("The young of {k} is called {v}.",),
        ("What is the young of {k} called?",),
        tuple((_article(k), _article(v)) for k, v in _column(_ANIMALS, 2)),
        "is the young of {k} called {v}",
    ),
    Relation(
        "body",
        BIOLOGY,
        ("What {k}? The answer is {v}.",),
        ("What {k}?",),
        _BODY,
    ),
    Relation(
        "symbol",
        CHEMISTRY,
        ("The chemical symbol of {k} is {v}.", "{v} is the chemical symbol of {k}."),
        ("What is the chemical symbol of {k}?",),
        _ELEMENTS,
        "is {v} the symbol of {k}",
    ),
    Relation(
        "element",
        CHEMISTRY,
        ("{k} is the chemical symbol of {v}.",),
        ("Which element has the chemical symbol {k}?",),
        _swap(_ELEMENTS),
    ),
    Relation(
        "holy_book",
        RELIGIONS,
        ("The holy book of {k} is {v}.", "{v} is the holy book of {k}."),
        ("What is the holy book of {k}?", "Which text is holy in {k}?"),
        _RELIGION_BOOKS,
        "is {v} the holy book of {k}",
    ),
    Relation(
        "book_religion",
        RELIGIONS,
        ("{k} is the holy book of {v}.",),
        ("{k} is the holy book of which religion?",),
        _swap(_RELIGION_BOOKS),
    ),
    Relation(
        "worship",
        RELIGIONS,
        ("The place of worship in {k} is {v}.", "In {k} people pray in {v}."),
        ("What is the place of worship in {k}?", "Where do people pray in {k}?"),
        _RELIGION_PLACES,
        "do people pray in {v} in {k}",
    ),
    Relation(
        "worship_religion",
        RELIGIONS,
        ("{k} is a place of worship in {v}.",),
        ("{k} is a place of worship in which religion?",),
        _swap(_RELIGION_PLACES),
    ),
    Relation(
        "number",
        GLOBAL,
        ("How many {k}? The answer is {v}.",),
        ("How many {k}?",),
        _NUMBERS,
    ),
    Relation(
        "opposite",
        MISC,
        ("The opposite of {k} is {v}.",),
        ("What is the opposite of {k}?",),
        _OPPOSITES,
        "is {v} the opposite of {k}",
    ),
    Relation(
        "space",
        GLOBAL,
        ("{v} {k}.",),
        ("What {k}?",),
        _SPACE,
    ),
    Relation(
        "definition",
        COMPUTING,
        ("{k} is {v}.",),
        ("What is {k}?",),
        TERMS,
    ),
    Relation(
        "term",
        COMPUTING,
        ("{v} is {k}.",),
        ("What do we call {k}?",),
        _swap(TERMS),
    ),
    Relation(
        "founder",
        MISC,
        ("{v} was a founder of {k}.",),
        ("Who was a founder of {k}?",),
        _FOUNDERS,
        "was {v} a founder of {k}",
    ),
    Relation(
        "ceo",
        MISC,
        ("The CEO of {k} is {v}.", "{v} is the CEO of {k}."),
        ("Who is the CEO of {k}?",),
        _CEOS,
    ),
)

SUBJECTS: dict[str, str] = {
    GEOGRAPHY: "social sciences",
    BIOLOGY: "STEM",
    CHEMISTRY: "STEM",
    COMPUTING: "STEM",
    RELIGIONS: "humanities",
    GLOBAL: "other (business, health, misc.)",
    MISC: "other (business, health, misc.)",
}
"""Multiple-choice subjects and the class each one belongs to."""


def sentence(text: str) -> str:
    """Return ``text`` with its first letter in upper case."""
    return text[:1].upper() + text[1:]
