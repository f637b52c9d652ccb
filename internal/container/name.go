package container

import (
	"math/rand/v2"
	"strconv"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
)

const nameMax = 255

// CheckName tells whether a user may give this name; a leading slash is dropped.
func CheckName(name string) (string, error) {
	n := strings.TrimPrefix(name, "/")
	ok := len(n) >= 2 && len(n) <= nameMax && alnum(n[0])
	for i := 1; ok && i < len(n); i++ {
		c := n[i]
		ok = alnum(c) || c == '_' || c == '.' || c == '-'
	}
	if !ok {
		return "", fault.New(fault.Invalid, "Invalid container name (%s), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed", name)
	}
	return n, nil
}

func alnum(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
}

// RandomName makes a name: an adjective and the surname of somebody who gave
// computing something, with a number from the second attempt on.
func RandomName(attempt int) string {
	n := adjectives[rand.IntN(len(adjectives))] + "_" + surnames[rand.IntN(len(surnames))]
	if attempt > 0 {
		n += strconv.Itoa(rand.IntN(1000))
	}
	return n
}

var adjectives = strings.Fields(`able airy alert amber ample apt ardent astute balmy blithe bold bonny brave breezy
bright brisk buoyant calm candid cheery chipper civil clear clever cosy crisp curious dainty dapper daring deft
dewy eager earnest easy fair fearless festive fine fleet fluent fond frank free fresh frosty gallant game genial
gentle glad gleeful golden grand handy hardy hearty honest humble ideal jaunty jolly jovial keen kind lean limber
lively loyal lucid lucky mellow merry mighty mild mindful mirthful modest neat nifty nimble noble patient peppy
perky placid plucky poised polite proud prudent quick quiet rapid ready regal robust rosy rugged sage serene sharp
shiny silken sleek smooth snappy snug sober solid spry stable stalwart starry steady stellar sterling sturdy subtle
sunny supple sure swift tidy trim trusty upbeat urbane valiant vital vivid warm wise witty worthy zesty zippy`)

var surnames = strings.Fields(`aho aiken allen amdahl atanasoff babbage bachman backus bartik berezin bernerslee blum
booth borg boole brooks buchberger burks bush cerf chomsky church clark codd conway cook cray dahl davies diffie
dijkstra earley eckert edmonds engelbart ershov estrin feigenbaum feinler flowers floyd forsythe glushkov goldberg
goldstine gosling gray hamilton hamming hellman hoare holberton hollerith hopcroft hopper huffman huskey ingalls
iverson joy kahan kahn karp kay kemeny kernighan kilburn kildall kleene kleinrock knuth kurtz lamarr lamport lampson
lebedev leibniz liskov lovelace mauchly mccarthy mcilroy meltzer metcalfe milner minsky moore naur newell newman
nygaard ornstein pascal perlis perlman postel pratt rabin ramakrishnan randell reynolds ritchie rivest roberts
samuel scott shamir shannon simon sipser steele stibitz strachey strassen stroustrup sussman sutherland tarjan
thacker thompson torres turing ullman valiant vaughan vonneumann wegner weizenbaum wheeler wiener wijngaarden
wilkes wilkinson williams wing wirth yao zuse`)
