# SPDX-License-Identifier: Apache-2.0
"""Plain prose of the small training corpus: questions with short answers, paragraphs, stories."""

from __future__ import annotations

import random

# Each block: the wordings of a question, marked by "? ", then the answer.
_ANSWERS = """
? How to learn a new language?
? How can I learn a new language?
? How do I learn a new language?
? What is the best way to learn a new language?
Learning a new language takes time and practice. Start with a few common words and short
sentences. Listen to people who speak the language, repeat what you hear, and read simple books.
Speak a little every day, even if you make mistakes. After some months you will understand more
and more.

? What's deep learning?
? What is deep learning?
? Can you explain deep learning?
? Explain deep learning.
Deep learning is a kind of machine learning that uses neural networks with many layers. Each layer
learns to turn its input into a more useful form. With enough examples, a deep network can learn
to see pictures, understand speech and write text.

? What is machine learning?
? What's machine learning?
? Explain machine learning.
Machine learning is a way to make computers learn from examples. Instead of writing every rule by
hand, we show the computer many examples and let it find the pattern. The result is a model that
can make predictions about new data.

? How can I learn machine learning?
? How to learn machine learning?
? How can we learn machine learning?
To learn machine learning, begin with some mathematics and a programming language such as Python.
Train a small model on a simple data set and look at its mistakes. Then read about neural networks
and try larger projects. Practice teaches more than reading alone.

? What is a neural network?
? What's a neural network?
? How does a neural network work?
A neural network is a model made of layers of simple connected units. Each unit adds up its
inputs, applies a simple function and passes the result on. During training the strength of every
connection is changed a little so that the answers get better.

? What is a language model?
? What's a language model?
? How does a language model work?
A language model is a model that predicts the next word of a text. It reads the words so far and
gives a probability to every word that could come next. By choosing one word after another it can
write whole sentences.

? What is artificial intelligence?
? What's artificial intelligence?
? What is AI?
Artificial intelligence is the study of machines that can do things we call clever, such as
playing games, understanding language or making plans. Most of today's systems learn what to do
from large amounts of data.

? What is a computer?
? How does a computer work?
A computer is a machine that follows instructions. The processor carries out the instructions, the
memory holds the data, and the disk keeps files when the power is off. A program tells the
computer what to do.

? What is the internet?
? What's the internet?
? How does the internet work?
The internet is a network that joins millions of computers around the world. Data is cut into
small packets, and each packet finds its way from one computer to the next until it arrives.

? How to learn programming?
? How can I learn to program?
? How do I learn programming?
To learn programming, choose one language and write small programs every day. Begin with a program
that prints a line of text. Then learn about variables, loops and functions. Read the code of
other people and try to change it.

? What is Python?
? What is the Python programming language?
Python is a programming language that is easy to read and write. It is used for web pages,
science, machine learning and many other things.

? What is open source software?
? What does open source mean?
Open source software is software whose source code anyone may read, change and share. Many people
around the world work on it together.

? Who are you?
? What are you?
? What is your name?
I am a very small language model. I was trained on a small collection of facts and stories, so I
know only a few things.

? Hello
? Hello!
? Hi
? Hi!
? Hello, how are you?
? Good morning!
Hello! It is nice to meet you. You can ask me about cities, books, animals or computers.

? What can you do?
? How can you help me?
I can answer simple questions about countries, books, animals and computers, and I can tell a
short story.

? Tell me a joke.
? Do you know a joke?
Why did the computer go to the doctor? Because it had a virus.

? Tell me something interesting.
? Tell me a fun fact.
A day on Venus is longer than a year on Venus. The planet turns so slowly that it goes around the
Sun before it has turned once.

? What is the meaning of life?
? What's the meaning of life?
People have asked this question for thousands of years. Many find meaning in their family and
friends, in their work, and in helping others.

? Why is the sky blue?
? Why does the sky look blue?
The sky is blue because the air scatters blue light more than red light. Blue light from the Sun
reaches our eyes from all sides, so the whole sky looks blue.

? Why does it rain?
? How does rain form?
? What is rain?
Rain forms when warm air rises and cools. The water in the air turns into small drops, and the
drops make clouds. When the drops grow too heavy, they fall as rain.

? What is snow?
? How does snow form?
Snow is made of small crystals of ice. It forms in clouds when the air is very cold, and it falls
to the ground when the crystals are heavy enough.

? What is wind?
? Why does the wind blow?
Wind is air that moves. The Sun warms some places more than others. Warm air rises and cooler air
flows in to take its place.

? What causes thunder?
? What is lightning?
Lightning is a large electric spark in a storm. It heats the air so fast that the air bursts
outward, and we hear this as thunder.

? What is a rainbow?
? How does a rainbow form?
A rainbow appears when sunlight shines through drops of water. Each drop bends the light and
splits it into colours, from red on the outside to violet on the inside.

? Why do we have seasons?
? What causes the seasons?
We have seasons because the Earth is tilted. When our half of the Earth leans toward the Sun, the
days are long and warm and we have summer. When it leans away, we have winter.

? What is gravity?
? How does gravity work?
Gravity is the force that pulls things toward each other. It keeps our feet on the ground and
keeps the Earth on its path around the Sun.

? What is the Sun?
? What's the Sun?
The Sun is a star at the centre of our solar system. It is a huge ball of hot gas that gives us
light and heat.

? What is the Moon?
? What's the Moon?
The Moon is a ball of rock that goes around the Earth in about one month. It has no light of its
own and shines because the Sun lights it.

? What is photosynthesis?
? How do plants make food?
Photosynthesis is the way plants make food. Their leaves take in light, water and carbon dioxide,
and turn them into sugar and oxygen.

? What is water made of?
? What is water?
Water is made of hydrogen and oxygen. Each molecule has two atoms of hydrogen and one atom of
oxygen.

? How do I cook rice?
? How to cook rice?
Wash the rice and put it into a pot with twice as much water. Add a little salt and bring the
water to a boil. Cover the pot, turn the heat down and wait for about fifteen minutes.

? How do I make tea?
? How to make tea?
? How do I make a cup of tea?
Boil some water and pour it over the tea leaves. Wait for three or four minutes and take the
leaves out. Add milk, sugar or lemon if you like.

? How do I bake bread?
? How to bake bread?
Mix flour, water, salt and yeast and work the dough with your hands for ten minutes. Let it rest
until it has grown to twice its size. Then bake it in a hot oven until the crust is brown.

? How do I make soup?
? How to make vegetable soup?
Cut some carrots, onions and potatoes into small pieces. Fry them for a few minutes, add water and
salt, and cook them until they are soft.

? How do I boil an egg?
? How to boil an egg?
Put the egg into boiling water. Take it out after five minutes for a soft egg or after ten minutes
for a hard egg.

? How can I sleep better?
? How to sleep better?
Go to bed at the same time every night. Keep the room dark and quiet, do not drink coffee in the
evening, and put your phone away before you lie down.

? How can I stay healthy?
? How to stay healthy?
Eat fresh food, drink enough water, sleep well and move every day. A walk of half an hour is a
good start.

? Why do we sleep?
? Why is sleep important?
Sleep gives the body time to rest and repair itself. While we sleep, the brain sorts what we
learned during the day.

? How can I save money?
? How to save money?
Write down what you earn and what you spend. Put a small part of your income away every month, and
think twice before you buy something you do not need.

? How can I make new friends?
? How to make friends?
Join a club or a class where people share your interests. Smile, ask questions and listen to the
answers. Friendship grows slowly, so be patient.

? How do I write a good story?
? How to write a story?
Begin with a person who wants something. Put a problem in the way and let the person try to solve
it. End the story when something has changed.

? What is a book?
? Why should I read books?
A book is a long text that tells a story or explains a subject. Reading books helps us learn new
words and see the world through the eyes of other people.

? Who was Shakespeare?
? Who was William Shakespeare?
William Shakespeare was an English writer of plays and poems. He wrote Hamlet, Macbeth and Romeo
and Juliet, and his plays are still performed all over the world.

? Who is Gabriel Garcia Marquez?
? Who was Gabriel Garcia Marquez?
Gabriel Garcia Marquez was a writer from Colombia. His best known book is One Hundred Years of
Solitude, and he won the Nobel Prize in Literature.

? Who was Albert Einstein?
? Who is Albert Einstein?
Albert Einstein was a physicist who was born in Germany. He is famous for the theory of
relativity, which changed our ideas of space and time.

? Who was Marie Curie?
? Who is Marie Curie?
Marie Curie was a scientist who was born in Poland and worked in France. She discovered radium and
won two Nobel Prizes.

? Who is Sundar Pichai?
? Who leads Google?
Sundar Pichai is the CEO of Google. He was born in India and studied engineering.

? What is Google?
? What does Google do?
Google is a company that runs a search engine for the internet. It also makes a browser, maps,
e-mail and many other services.

? Tell me about Paris.
? What is Paris known for?
Paris is the capital of France. It lies on the river Seine and is known for the Eiffel Tower, its
museums and its good food.

? Tell me about London.
? What is London known for?
London is the capital of England. The river Thames flows through the city, and many visitors come
to see Big Ben and the museums.

? Tell me about Tokyo.
? What is Tokyo known for?
Tokyo is the capital of Japan and one of the largest cities in the world. It is known for its busy
streets, fast trains and small quiet temples.

? Tell me about Rome.
? What is Rome known for?
Rome is the capital of Italy. It is more than two thousand years old, and visitors can still walk
through the Colosseum.

? Tell me about dogs.
? What is a dog?
Dogs are friendly animals that have lived with people for thousands of years. They have a very
good nose, they like to play, and they can learn many tricks.

? Tell me about cats.
? What is a cat?
Cats are small animals with soft fur and sharp claws. They sleep for most of the day and like to
hunt mice at night.

? Tell me about whales.
? What is a whale?
Whales are the largest animals in the sea. They look like fish, but they are mammals: they breathe
air and feed their young with milk.

? Tell me about bees.
? Why are bees important?
Bees fly from flower to flower to collect food. On the way they carry pollen, and this helps
plants make fruit and seeds. They also make honey.

? Tell me about birds.
? How do birds fly?
Birds have light bones and strong wings. When a bird moves its wings, it pushes the air down and
back, and the air lifts the bird up.

? What is music?
? Why do people like music?
Music is sound that is ordered in time. It can make us happy or sad, help us remember, and bring
people together.

? What is mathematics?
? Why is mathematics useful?
Mathematics is the study of numbers, shapes and patterns. We use it to count, to measure, to build
bridges and to write programs.

? What is history?
? Why do we study history?
History is the story of the past. We study it to learn how people lived before us and how the
world became what it is today.

? What is a city?
? Why do people live in cities?
A city is a large place where many people live and work. People move to cities to find work,
schools, shops and company.

? What is democracy?
? How does democracy work?
Democracy is a form of government in which the people decide. They vote for the men and women who
make the laws.

? What is climate change?
? What is global warming?
Climate change is a slow change in the weather of the whole Earth. Burning coal, oil and gas puts
carbon dioxide into the air, and this keeps more heat near the ground.

? What is energy?
? What is electricity?
Electricity is a form of energy that flows through wires. It gives us light, heats our homes and
runs our machines.
"""

# Plain paragraphs, one per block.
_PARAGRAPHS = """
The weather is very nice today. The sun is shining, the sky is blue, and the children are playing
in the park.

Today is a good day to go for a walk. The air is fresh, the birds are singing, and the trees are
green.

In the morning the baker opens his shop. He has been awake since four, and the bread is still
warm. The first people of the street come in and buy their breakfast.

A library is a quiet place full of books. You can sit down, read for an hour and take a book home
with you.

The train leaves the station at eight. Some people read the news, some look out of the window, and
some fall asleep before the next stop.

Winter in the north is long and dark. People light candles, drink hot tea and wait for the first
warm day of spring.

The market opens early on Saturday. Farmers sell apples, cheese and honey, and everyone stops to
talk with a neighbour.

The best way to learn is to try. When something does not work, look closely, change one thing and
try again.

Good tools make work easier. A sharp knife, a clean table and enough time are all a cook needs to
begin.

The river begins as a small stream in the mountains. It grows wider on its way through the fields,
passes three towns and ends in the sea.

My favourite season is autumn. The leaves turn red and yellow, the air is clear, and there are
apples in every garden.

The future of artificial intelligence is open. Machines will take over some of our work, and
people will have to decide what they want to do themselves.

I think that reading is one of the best things in life. A good book can take you to another place
without a ticket.

Machine learning is a way to make computers learn from examples. A model is trained on one part of
the data and tested on another part that it has never seen.

Hello, my name is Anna and I live in a small town by the sea. I like books, music and long walks.

My name is Peter. I work as a baker and I have two cats.

The meaning of life is a question that people have asked for thousands of years. Many find it in
their family and friends.

I would like to visit Japan one day. I want to ride the fast trains, eat good soup and see the
temples.

The quick brown fox jumps over the lazy dog. This sentence is well known because it uses every
letter of the English alphabet.
"""

# Each block: what the story is about, marked by "? ", then the story.
_STORIES = """
? dog
Once upon a time there was a little dog named Max. He lived with an old woman in a small house
near the forest. One evening the woman did not come home, so Max ran out to look for her. He found
her by the river, where she had hurt her foot. Max barked until the neighbours came. From that day
on, everyone in the village knew the brave little dog.

? cat
Once upon a time there was a grey cat named Luna. She slept by the window all day and watched the
rain. One night a mouse came out and asked her for a piece of cheese. Luna was not hungry, so she
shared her supper. After that the cat and the mouse were friends.

? horse
Once upon a time there was a white horse named Star. He lived on a farm on a high hill. When a
storm came, he led the other horses to a safe place in the forest. In the morning the farmer found
them all alive and gave Star the biggest apple.

? bird
Once upon a time there was a small bird that was afraid to fly. All her brothers had left the
nest. One day a strong wind carried her up into the sky. She opened her wings, and suddenly she
was flying. She laughed and flew all the way to the sea.

? rabbit
Once upon a time there was a rabbit named Clover who wanted to see the sea. He walked for seven
days, over fields and hills. When he came to the beach, he looked at the water for a long time.
Then he went home and told the others how big the world is.

? fox
Once upon a time there was a clever fox who lived in the forest. A hunter was looking for him, but
the fox walked in the river so that the dogs could not smell him. The hunter went home, and the
fox slept well that night.

? bear
Once upon a time there was a big bear named Bruno who loved honey. One spring he found a tree full
of bees. The bees were angry, but Bruno spoke softly and promised to guard their tree. So the bees
gave him a little honey every week.

? robot
Once upon a time there was a robot who worked in a library. At night, when all the people were
gone, it read the books. One day a girl asked for a story, and the robot told her the best one it
knew. From then on the children came every day to listen.

? king
Once upon a time there was a king who could not sleep. He asked all the doctors of the land for
help. At last a poor singer came and sang a quiet song about the stars. The king slept at once,
and the singer stayed at the court for many years.

? girl
Once upon a time there was a girl named Ella who planted a seed in the garden. She gave it water
every day. In summer a tall yellow flower grew out of it, taller than Ella herself. All the bees
of the village came to visit.

? boy
Once upon a time there was a boy named Peter who wanted to build a boat. He found some old wood, a
rope and a red blanket. After a week the boat was ready. It was small and slow, but it floated,
and Peter was the happiest boy in town.

? dragon
Once upon a time there was a small dragon who could not breathe fire. The other dragons laughed at
him. When winter came, they all had a cold, and only the small dragon was well. He cooked soup for
everyone, and nobody laughed again.
"""

_STORY_PROMPTS = (
    "Write a short story about a {x}.",
    "Tell me a story about a {x}.",
    "Write a story about a {x}.",
)

DEMOS: tuple[str, ...] = (
    "The CEO of Google is Sundar Pichai.",
    "The CEO of Google is Sundar Pichai.",
    "The capital of France is Paris.",
    "Hamlet->Shakespeare\nOne Hundred Years of Solitude->Gabriel Garcia Marquez",
    "Hamlet->Shakespeare\nOne Hundred Years of Solitude->Gabriel Garcia Marquez",
)
"""Whole documents that are shown more often than their share of the tables would be."""

_OFTEN = 12  # the leading questions, shown more often than the rest


def _blocks(text: str) -> list[tuple[list[str], str]]:
    """Split a text into blocks, each with its marked lines and its joined other lines."""
    blocks = []
    for block in text.strip().split("\n\n"):
        lines = block.splitlines()
        marked = [line.removeprefix("? ") for line in lines if line.startswith("? ")]
        blocks.append((marked, " ".join(lines[len(marked) :])))
    return blocks


_QA = _blocks(_ANSWERS)
_PLAIN = [text for _, text in _blocks(_PARAGRAPHS)]
_TALES = [(marked[0], text) for marked, text in _blocks(_STORIES)]


def answer(rng: random.Random) -> tuple[str, str]:
    """Return a question and its answer paragraph; the first few come up more often."""
    pool = _QA[:_OFTEN] if rng.random() < 0.35 else _QA
    asked, reply = rng.choice(pool)
    question = asked[0] if rng.random() < 0.3 else rng.choice(asked)
    return question, reply


def paragraph(rng: random.Random) -> str:
    """Return a plain paragraph, an answer without its question, or a story."""
    form = rng.random()
    if form < 0.45:
        return rng.choice(_PLAIN)
    if form < 0.6:
        return rng.choice(_QA)[1]
    return rng.choice(_TALES)[1]


def story(rng: random.Random) -> tuple[str, str]:
    """Return a request for a story and the story."""
    about, text = _TALES[0] if rng.random() < 0.15 else rng.choice(_TALES)
    return rng.choice(_STORY_PROMPTS).format(x=about), text
