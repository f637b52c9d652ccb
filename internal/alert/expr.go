package alert

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// kind is the type of a variable.
type kind uint8

const (
	number kind = iota
	word
)

// scope says what a variable is about.
type scope uint8

const (
	ofContainer scope = iota
	ofEngine
)

// cost says what must be read for a variable.
type cost uint8

const (
	stats cost = 1 << iota // counters of the cgroup
	disk                   // size of the writable layer
)

type variable struct {
	kind  kind
	scope scope
	cost  cost
}

// variables are all that an expression may name.
var variables = map[string]variable{
	"cpu":          {number, ofContainer, stats}, // percent of one processor
	"memory":       {number, ofContainer, stats}, // percent of the limit, without page cache that can be dropped
	"memory_bytes": {number, ofContainer, stats},
	"pids":         {number, ofContainer, stats},
	"disk_bytes":   {number, ofContainer, disk},
	"restarts":     {number, ofContainer, 0},
	"uptime":       {number, ofContainer, 0}, // seconds
	"exit_code":    {number, ofContainer, 0},
	"state":        {word, ofContainer, 0},
	"health":       {word, ofContainer, 0},
	"event":        {word, ofContainer, 0},
	"disk_used":    {number, ofEngine, 0}, // percent of the file system of the engine's root
	"running":      {number, ofEngine, 0}, // containers
}

// Values are what an expression is judged on. A variable that is missing makes
// each comparison with it false.
type Values struct {
	Numbers map[string]float64
	Words   map[string]string
}

// Expr is a condition: comparisons joined by and, or, not and parentheses.
type Expr struct {
	text  string
	root  node
	names []string
}

type node interface{ eval(v *Values) bool }

type (
	both    struct{ a, b node }
	either  struct{ a, b node }
	inverse struct{ a node }
	compare struct {
		name, op string
		num      float64
		word     string
		kind     kind
	}
)

func (n both) eval(v *Values) bool    { return n.a.eval(v) && n.b.eval(v) }
func (n either) eval(v *Values) bool  { return n.a.eval(v) || n.b.eval(v) }
func (n inverse) eval(v *Values) bool { return !n.a.eval(v) }

func (n compare) eval(v *Values) bool {
	if n.kind == word {
		w, ok := v.Words[n.name]
		return ok && (w == n.word) == (n.op == "==")
	}
	x, ok := v.Numbers[n.name]
	if !ok {
		return false
	}
	switch n.op {
	case ">":
		return x > n.num
	case ">=":
		return x >= n.num
	case "<":
		return x < n.num
	case "<=":
		return x <= n.num
	case "==":
		return x == n.num
	}
	return x != n.num
}

// Eval judges the condition.
func (e *Expr) Eval(v *Values) bool { return e.root.eval(v) }

// Names are the variables that it uses, sorted.
func (e *Expr) Names() []string { return e.names }

func (e *Expr) uses(s scope) bool {
	return slices.ContainsFunc(e.names, func(n string) bool { return variables[n].scope == s })
}

func (e *Expr) needs(c cost) bool {
	return slices.ContainsFunc(e.names, func(n string) bool { return variables[n].cost&c != 0 })
}

func (e *Expr) has(name string) bool { return slices.Contains(e.names, name) }

// Limits of an expression.
const (
	maxExpr  = 4096
	maxDepth = 64
)

type parser struct {
	tokens []string
	pos    int
	depth  int
	names  map[string]bool
}

// ParseExpr reads a condition such as "memory > 80% and state == running".
func ParseExpr(s string) (*Expr, error) {
	if len(s) > maxExpr {
		return nil, fmt.Errorf("cannot read the condition: it is longer than %d bytes", maxExpr)
	}
	tokens, err := tokenize(s)
	if err != nil {
		return nil, err
	}
	p := &parser{tokens: tokens, names: map[string]bool{}}
	root, err := p.or()
	if err == nil && p.pos < len(p.tokens) {
		err = fmt.Errorf("cannot read the condition: %q is not expected", p.tokens[p.pos])
	}
	if err != nil {
		return nil, err
	}
	e := &Expr{text: s, root: root}
	for n := range p.names {
		e.names = append(e.names, n)
	}
	slices.Sort(e.names)
	if e.uses(ofContainer) && e.uses(ofEngine) {
		return nil, fmt.Errorf("cannot use the condition %q: it mixes what containers are with what the engine is", s)
	}
	return e, nil
}

func tokenize(s string) ([]string, error) {
	var out []string
	for i := 0; i < len(s); {
		c := s[i]
		switch {
		case unicode.IsSpace(rune(c)):
			i++
		case c == '(' || c == ')':
			out = append(out, string(c))
			i++
		case strings.IndexByte("<>=!&|", c) >= 0:
			j := i + 1
			if j < len(s) && (s[j] == '=' || (c == '&' || c == '|') && s[j] == c) {
				j++
			}
			out = append(out, s[i:j])
			i = j
		case c == '"' || c == '\'':
			j := strings.IndexByte(s[i+1:], c)
			if j < 0 {
				return nil, fmt.Errorf("cannot read the condition: a quote is not closed")
			}
			out = append(out, s[i:i+1+j]) // keeps the opening quote as a mark
			i += j + 2
		default:
			j := i
			for j < len(s) && !unicode.IsSpace(rune(s[j])) && strings.IndexByte("()<>=!&|\"'", s[j]) < 0 {
				j++
			}
			out = append(out, s[i:j])
			i = j
		}
	}
	return out, nil
}

func (p *parser) peek() string {
	if p.pos < len(p.tokens) {
		return p.tokens[p.pos]
	}
	return ""
}

func (p *parser) next() string {
	t := p.peek()
	p.pos++
	return t
}

func (p *parser) or() (node, error) {
	a, err := p.and()
	for err == nil && (p.peek() == "or" || p.peek() == "||") {
		p.next()
		var b node
		b, err = p.and()
		a = either{a, b}
	}
	return a, err
}

func (p *parser) and() (node, error) {
	a, err := p.not()
	for err == nil && (p.peek() == "and" || p.peek() == "&&") {
		p.next()
		var b node
		b, err = p.not()
		a = both{a, b}
	}
	return a, err
}

func (p *parser) not() (node, error) {
	if p.depth++; p.depth > maxDepth {
		return nil, fmt.Errorf("cannot read the condition: it is nested too deeply")
	}
	defer func() { p.depth-- }()
	switch p.peek() {
	case "not", "!":
		p.next()
		a, err := p.not()
		return inverse{a}, err
	case "(":
		p.next()
		a, err := p.or()
		if err == nil && p.next() != ")" {
			err = fmt.Errorf("cannot read the condition: a parenthesis is not closed")
		}
		return a, err
	}
	return p.comparison()
}

func (p *parser) comparison() (node, error) {
	name := p.next()
	v, ok := variables[name]
	if !ok {
		if name == "" {
			return nil, fmt.Errorf("cannot read the condition: something is missing at its end")
		}
		return nil, fmt.Errorf("cannot read the condition: there is no %q; there are %s", name, strings.Join(names(), ", "))
	}
	p.names[name] = true
	c := compare{name: name, op: p.next(), kind: v.kind}
	if c.op == "=" {
		c.op = "=="
	}
	if !slices.Contains([]string{">", ">=", "<", "<=", "==", "!="}, c.op) {
		return nil, fmt.Errorf("cannot read the condition: %q is no comparison", c.op)
	}
	value := p.next()
	if value == "" {
		return nil, fmt.Errorf("cannot read the condition: %s %s lacks a value", c.name, c.op)
	}
	if v.kind == word {
		if c.op != "==" && c.op != "!=" {
			return nil, fmt.Errorf("cannot read the condition: %s is a word, compare it with == or !=", c.name)
		}
		c.word = strings.TrimLeft(value, `"'`)
		return c, nil
	}
	n, err := parseNumber(value)
	c.num = n
	return c, err
}

func names() []string {
	var l []string
	for n := range variables {
		l = append(l, n)
	}
	slices.Sort(l)
	return l
}

// parseNumber reads 80, 80%, 1.5g (binary), 90s, 5m.
func parseNumber(s string) (float64, error) {
	bad := fmt.Errorf("cannot read the condition: %q is no number (write 80, 80%%, 512MB or 5min)", s)
	i := len(s)
	for i > 0 && (s[i-1] < '0' || s[i-1] > '9') && s[i-1] != '.' {
		i--
	}
	n, err := strconv.ParseFloat(s[:i], 64)
	if err != nil {
		return 0, bad
	}
	unit, ok := map[string]float64{"": 1, "%": 1, "k": 1 << 10, "kb": 1 << 10, "kib": 1 << 10, "m": 1 << 20, "mb": 1 << 20, "mib": 1 << 20,
		"g": 1 << 30, "gb": 1 << 30, "gib": 1 << 30, "t": 1 << 40, "tb": 1 << 40, "s": 1, "min": 60, "h": 3600, "d": 86400}[strings.ToLower(s[i:])]
	if !ok {
		return 0, bad
	}
	return n * unit, nil
}

// seconds is a duration as an expression has it.
func seconds(d time.Duration) float64 { return d.Seconds() }
