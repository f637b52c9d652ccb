package classic

import (
	"bytes"
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/frontend/dockerfile/shell"
	"github.com/opencontainers/go-digest"
)

// maxDockerfile bounds a Dockerfile that is read to tell of it.
const maxDockerfile = 4 << 20

// scratch is the base image that is none.
const scratch = "scratch"

// script is a Dockerfile as its instructions are told one after the other.
type script struct {
	steps []*step
	// unused are the build arguments that no instruction takes.
	unused []string
	// warnings are the parser's.
	warnings string
}

// step is an instruction, FROM and the ARGs before it included.
type step struct {
	n     int
	text  string
	stage *stage
	cmd   instructions.Command // nil for FROM, and for what comes before it
	from  bool
	// index is the place among those instructions of a stage that BuildKit shows;
	// it counts the triggers of the base image for none. 0 is never shown.
	index int
	lines [2]int

	vertex                           digest.Digest
	began, running, done, hit, ended bool
	fault                            string
	held                             []string // output, until it is this one's turn
}

// stage is a part of a Dockerfile that begins with FROM.
type stage struct {
	name   string // BuildKit's
	given  string // the Dockerfile's
	base   *stage // nil is an image, or nothing
	blank  bool   // from scratch
	steps  []*step
	shown  int // the instructions that BuildKit shows
	needed bool
	// triggers are the instructions of the base image that were seen.
	triggers map[int]*trigger
}

type trigger struct {
	text        string
	began, done bool
	held        []string
}

// refused is a Dockerfile that cannot be built, in Docker's words. Late ones are
// told in the stream.
type refused struct {
	text string
	late bool
}

func (r refused) Error() string { return r.text }

// readScript understands a Dockerfile. It returns nil for one that another
// frontend is to read.
func readScript(name string, dt []byte, o *options) (*script, error) {
	if len(dt) == 0 {
		return nil, refused{text: fmt.Sprintf("the Dockerfile (%s) cannot be empty", name)}
	}
	if _, _, _, ok := parser.DetectSyntax(dt); ok {
		return nil, nil
	}
	res, err := parser.Parse(bytes.NewReader(dt))
	if err != nil {
		return nil, refused{text: fmt.Sprintf("failed to parse %s: %s", name, err)}
	}
	stages, before, err := instructions.Parse(res.AST, nil)
	if err != nil {
		return nil, refused{text: err.Error()}
	}
	alone := len(stages) == 1
	if target := o.attrs["target"]; target != "" {
		i, ok := instructions.HasStage(stages, target)
		if !ok {
			if i, err = strconv.Atoi(target); err != nil || i < 0 || i >= len(stages) {
				return nil, refused{text: fmt.Sprintf("target stage %q could not be found", target)}
			}
		}
		stages = stages[:i+1]
	}
	if len(stages) == 0 {
		return nil, refused{text: "dockerfile contains no stages to build"}
	}
	last := &stages[len(stages)-1]
	for _, k := range slices.Sorted(maps.Keys(o.labels)) {
		last.AddCommand(instructions.NewLabelCommand(k, o.labels[k], true))
	}
	s := &script{}
	var warned strings.Builder
	res.PrintWarnings(&warned)
	s.warnings = warned.String()
	args := s.before(before, res.EscapeToken, o)
	var built []*stage
	for i := range stages {
		st, err := s.add(&stages[i], i, built, args, res.EscapeToken)
		if err != nil {
			return nil, err
		}
		if alone {
			st.name = ""
		}
		built = append(built, st)
	}
	if end := built[len(built)-1]; end.blank && len(end.steps) == 1 {
		return nil, refused{text: "No image was generated. Is your Dockerfile empty?", late: true}
	}
	need(built[len(built)-1], built)
	s.unusedArgs(before, stages, o)
	return s, nil
}

// need marks a stage and those that it is made from.
func need(st *stage, all []*stage) {
	if st == nil || st.needed {
		return
	}
	st.needed = true
	need(st.base, all)
	for _, x := range st.steps {
		switch c := x.cmd.(type) {
		case *instructions.CopyCommand:
			need(named(c.From, all), all)
		case *instructions.RunCommand:
			for _, m := range instructions.GetMounts(c) {
				need(named(m.From, all), all)
			}
		}
	}
}

// named finds a stage by its name or number.
func named(name string, all []*stage) *stage {
	for _, st := range all {
		if name != "" && strings.EqualFold(st.given, name) {
			return st
		}
	}
	if n, err := strconv.Atoi(name); err == nil && n >= 0 && n < len(all) {
		return all[n]
	}
	return nil
}

func (s *script) step(text string, st *stage, lines []parser.Range) *step {
	x := &step{n: len(s.steps) + 1, text: text, stage: st}
	if len(lines) > 0 {
		x.lines = [2]int{lines[0].Start.Line, lines[len(lines)-1].End.Line}
	}
	s.steps = append(s.steps, x)
	return x
}

// before takes the ARGs ahead of the first FROM, and says what FROM may use.
func (s *script) before(list []instructions.ArgCommand, escape rune, o *options) map[string]string {
	env := map[string]string{}
	for i := range list {
		s.step(list[i].String(), nil, list[i].Location())
		for _, a := range list[i].Args {
			switch v, given := o.attrs["build-arg:"+a.Key]; {
			case given:
				env[a.Key] = v
			case a.Value != nil:
				env[a.Key] = expand(*a.Value, env, escape)
			}
		}
	}
	return env
}

func expand(s string, env map[string]string, escape rune) string {
	var l []string
	for k, v := range env {
		l = append(l, k+"="+v)
	}
	w, _, err := shell.NewLex(escape).ProcessWord(s, shell.EnvsFromSlice(l))
	if err != nil {
		return s
	}
	return w
}

// add takes a stage. Its names for others are those before it.
func (s *script) add(from *instructions.Stage, i int, built []*stage, args map[string]string, escape rune) (*stage, error) {
	st := &stage{name: from.Name, given: from.Name, triggers: map[int]*trigger{}}
	if st.name == "" {
		st.name = "stage-" + strconv.Itoa(i)
	}
	base := expand(from.BaseName, args, escape)
	st.blank = base == scratch
	for _, b := range built { // a number is an image's name here
		if strings.EqualFold(b.given, base) {
			st.base = b
		}
	}
	x := s.step(from.SourceCode, st, from.Location)
	x.from = true
	st.steps = append(st.steps, x)
	if !st.blank && st.base == nil {
		st.shown++
		x.index = st.shown
	}
	for _, cmd := range from.Commands {
		x := s.step(fmt.Sprint(cmd), st, cmd.Location())
		x.cmd = cmd
		st.steps = append(st.steps, x)
		switch c := cmd.(type) {
		case *instructions.CopyCommand:
			if err := checkFrom(c.From, i, built); err != nil {
				return nil, err
			}
			st.show(x)
			if c.Link && !st.blank {
				st.shown++ // it is shown twice
			}
		case *instructions.AddCommand:
			st.show(x)
			if c.Link && !st.blank {
				st.shown++
			}
		case *instructions.RunCommand:
			st.show(x)
		case *instructions.WorkdirCommand:
			if path.Clean(c.Path) != "/" {
				st.show(x)
			}
		}
	}
	return st, nil
}

func (st *stage) show(x *step) {
	st.shown++
	x.index = st.shown
}

// checkFrom refuses a stage's number that is none before this one.
func checkFrom(from string, self int, built []*stage) error {
	n, err := strconv.Atoi(from)
	if err != nil || named(from, built) != nil {
		return nil
	}
	why := "index out of bounds"
	if n == self {
		why = "refers to current build stage"
	}
	return refused{text: fmt.Sprintf("invalid from flag value %s: %s", from, why), late: true}
}

// always are build arguments that need no ARG.
var always = []string{"HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY"}

// unusedArgs finds what was given and is taken by no ARG.
func (s *script) unusedArgs(before []instructions.ArgCommand, stages []instructions.Stage, o *options) {
	taken := map[string]bool{}
	take := func(c *instructions.ArgCommand) {
		for _, a := range c.Args {
			taken[a.Key] = true
		}
	}
	for i := range before {
		take(&before[i])
	}
	for i := range stages {
		for _, cmd := range stages[i].Commands {
			if c, ok := cmd.(*instructions.ArgCommand); ok {
				take(c)
			}
		}
	}
	for _, k := range o.args {
		if !taken[k] && !slices.Contains(always, strings.ToUpper(k)) && !strings.HasPrefix(k, "BUILDKIT_") {
			s.unused = append(s.unused, k)
		}
	}
	slices.Sort(s.unused)
}

// shell is what runs a stage's commands at a step.
func (x *step) shell() []string {
	for st, below := x.stage, false; st != nil; st, below = st.base, true {
		for _, y := range slices.Backward(st.steps) {
			if !below && y.n >= x.n {
				continue
			}
			if c, ok := y.cmd.(*instructions.ShellCommand); ok {
				return c.Shell
			}
		}
	}
	return []string{"/bin/sh", "-c"}
}

// command is what a RUN runs, "" if the step is none.
func (x *step) command() string {
	c, ok := x.cmd.(*instructions.RunCommand)
	if !ok {
		return ""
	}
	words := c.CmdLine
	if c.PrependShell {
		words = append(slices.Clone(x.shell()), words...)
	}
	return strings.Join(words, " ")
}
