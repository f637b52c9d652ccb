package classic

import (
	"errors"
	"fmt"
	"maps"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/cloudos-io/cloudos/buildd/internal/upload"
)

// teller tells of a build in the order of its Dockerfile. BuildKit works on
// several instructions at once and shows neither those that only change the
// configuration nor those that nothing needs; an instruction is told when all
// before it are done, and what it wrote meanwhile is kept.
type teller struct {
	out    *output
	quiet  bool
	script *script
	tree   *upload.Tree

	next int // the step whose turn it is
	by   map[digest.Digest]*step
	trig map[digest.Digest]*trigger
	// bad is the first vertex that failed.
	bad digest.Digest
}

func newTeller(out *output, quiet bool, s *script, tree *upload.Tree) *teller {
	t := &teller{out: out, quiet: quiet, script: s, tree: tree, by: map[digest.Digest]*step{}, trig: map[digest.Digest]*trigger{}}
	if s.warnings != "" {
		t.say(s.warnings)
	}
	return t
}

func (t *teller) say(s string) {
	if !t.quiet && s != "" {
		t.out.stream(s)
	}
}

// placed is how the Dockerfile frontend names a vertex: "[stage 2/5] RUN true".
var placed = regexp.MustCompile(`(?s)^\[(?:(\S+) +| *)(\d+)/(\d+)\] (ONBUILD )?(.*)$`)

// tell takes in what happened.
func (t *teller) tell(s *client.SolveStatus) {
	for _, v := range s.Vertexes { // triggers first: they move the others' places
		t.place(v, true)
	}
	for _, v := range s.Vertexes {
		t.place(v, false)
		if v.Error != "" && t.bad == "" {
			t.bad = v.Digest
		}
		if x := t.by[v.Digest]; x != nil {
			x.began = x.began || v.Started != nil
			if v.Completed != nil {
				x.done, x.hit, x.fault = v.Error == "", v.Cached, v.Error
			}
		}
		if g := t.trig[v.Digest]; g != nil {
			g.began = g.began || v.Started != nil
			g.done = g.done || v.Completed != nil && v.Error == ""
		}
	}
	for _, l := range s.Logs {
		text := string(l.Data)
		if l.Stream == 2 {
			text = "\x1b[91m" + text + "\x1b[0m"
		}
		if x := t.by[l.Vertex]; x != nil {
			x.held = append(x.held, text)
		} else if g := t.trig[l.Vertex]; g != nil {
			g.held = append(g.held, text)
		}
	}
	t.advance()
}

// place finds the step that a vertex carries out.
func (t *teller) place(v *client.Vertex, triggers bool) {
	if t.by[v.Digest] != nil || t.trig[v.Digest] != nil {
		return
	}
	m := placed.FindStringSubmatch(v.Name)
	if m == nil || (m[4] != "") != triggers {
		return
	}
	k, err := strconv.Atoi(m[2])
	if err != nil {
		return
	}
	for _, x := range t.script.steps {
		if x.stage == nil || x.stage.name != m[1] {
			continue
		}
		if triggers {
			g := &trigger{text: m[5]}
			x.stage.triggers[k] = g
			t.trig[v.Digest] = g
			return
		}
		at := x.index
		if !x.from && at > 0 {
			at += len(x.stage.triggers)
		}
		if at == k && x.vertex == "" {
			x.vertex = v.Digest
			t.by[v.Digest] = x
			return
		}
	}
}

// past tells that a step must be done, since one above it in its stage began.
func (t *teller) past(x *step) bool {
	after := false
	for _, y := range x.stage.steps {
		if after && y.index > 0 && (y.began || y.done) {
			if c, ok := y.cmd.(*instructions.CopyCommand); !ok || !c.Link {
				return true
			}
		}
		after = after || y == x
	}
	return false
}

// neighbours are the nearest steps in a stage that BuildKit shows.
func (x *step) neighbours() (before, after *step) {
	for _, y := range x.stage.steps {
		switch {
		case y.index == 0:
		case y.n > x.n && after == nil:
			after = y
		case y.n < x.n && !y.from:
			before = y
		}
	}
	return before, after
}

// advance tells of all that is done in order, and of what goes on.
func (t *teller) advance() {
	for t.next < len(t.script.steps)-1 { // the last waits for the image
		x := t.script.steps[t.next]
		if !t.proceed(x) {
			return
		}
		t.close(x, x.id())
	}
	if t.next == len(t.script.steps)-1 {
		if x := t.script.steps[t.next]; x.index > 0 && x.began {
			t.open(x)
		}
	}
}

// proceed tells whether a step is over.
func (t *teller) proceed(x *step) bool {
	switch {
	case x.stage == nil || !x.stage.needed:
		return true
	case x.fault != "":
		t.open(x)
		return false
	case x.index > 0:
		if x.began {
			t.open(x)
		}
		if !x.done && !t.past(x) {
			return false
		}
		if x.from {
			// The triggers of the image run before what comes next.
			if _, after := x.neighbours(); after == nil {
				return t.seen(x.stage.steps[len(x.stage.steps)-1].n + 1)
			}
			return t.past(x)
		}
		return true
	case x.from:
		return t.seen(x.n) // a stage or scratch: no vertex of its own
	}
	before, after := x.neighbours()
	switch {
	case after != nil && (after.began || after.done):
		x.hit = after.hit
	case after == nil && t.seen(x.stage.steps[len(x.stage.steps)-1].n+1):
		x.hit = before != nil && before.hit
	default:
		return false
	}
	return true
}

// seen tells whether anything of the n-th step or of one after it began.
func (t *teller) seen(n int) bool {
	for _, x := range t.script.steps[min(n-1, len(t.script.steps)):] {
		if x.began {
			return true
		}
	}
	return false
}

// open tells that a step began, and what it wrote.
func (t *teller) open(x *step) {
	if !x.running {
		x.running = true
		t.say(fmt.Sprintf("Step %d/%d : %s\n", x.n, len(t.script.steps), x.text))
		if _, ok := x.cmd.(*instructions.RunCommand); ok && !x.hit && x.began {
			t.say(" ---> Running in " + short(x.id()) + "\n")
		}
	}
	for _, s := range x.held {
		t.say(s)
	}
	x.held = nil
}

// close tells that a step is over; id is what came of it.
func (t *teller) close(x *step, id string) {
	t.open(x)
	x.ended = true
	t.next++
	if x.stage == nil {
		return
	}
	if !x.stage.needed && !x.began {
		t.say(" ---> Skipped: nothing needs this stage\n")
		return
	}
	if x.from {
		t.triggered(x)
	}
	switch _, run := x.cmd.(*instructions.RunCommand); {
	case x.hit && !x.from:
		t.say(" ---> Using cache\n")
	case run && x.began:
		t.say(" ---> Removed intermediate container " + short(x.id()) + "\n")
	}
	t.say(" ---> " + short(id) + "\n")
}

func (t *teller) triggered(x *step) {
	n := len(x.stage.triggers)
	if n == 0 {
		return
	}
	plural := ""
	if n > 1 {
		plural = "s"
	}
	t.say(fmt.Sprintf("# Executing %d build trigger%s\n", n, plural))
	for _, k := range slices.Sorted(maps.Keys(x.stage.triggers)) {
		for _, s := range x.stage.triggers[k].held {
			t.say(s)
		}
	}
}

// id names what a step made: its entry in the cache, or a name that follows from
// the steps before. It is not that of an image.
func (x *step) id() string {
	switch {
	case x.vertex != "":
		return x.vertex.String()
	case x.from && x.stage.base != nil:
		below := x.stage.base.steps
		return below[len(below)-1].id()
	case x.from && x.stage.blank:
		return ""
	}
	before := ""
	if x.stage != nil {
		if i := slices.Index(x.stage.steps, x); i > 0 {
			before = x.stage.steps[i-1].id()
		}
	}
	return digest.FromString(before + "\n" + x.text).String()
}

// end tells the rest of a build that made the image id. Known tells that the
// engine had it before.
func (t *teller) end(id string, known bool) {
	for t.next < len(t.script.steps) {
		x := t.script.steps[t.next]
		if x.vertex == "" && x.index == 0 && !x.from && x.stage != nil {
			if _, after := x.neighbours(); after != nil {
				x.hit = after.hit
			} else {
				x.hit = known
			}
		}
		to := x.id()
		if x.n == len(t.script.steps) {
			to = id
		}
		t.close(x, to)
	}
	if len(t.script.unused) > 0 {
		t.say(fmt.Sprintf("[Warning] One or more build-args %v were not consumed\n", t.script.unused))
	}
}

// explain says in Docker's words why a build ended.
func (t *teller) explain(err error) string {
	x := t.culprit(err)
	msg := strings.TrimPrefix(err.Error(), "failed to solve: ")
	if x == nil {
		return msg
	}
	for t.next < x.n-1 {
		if y := t.script.steps[t.next]; y.index == 0 || y.done || t.past(y) || !y.stage.needed {
			t.close(y, y.id())
		} else {
			t.next++ // another stage's, which went on meanwhile
		}
	}
	t.open(x)
	if cmd := x.command(); cmd != "" && isExit(err) {
		return fmt.Sprintf("The command '%s' returned a non-zero code: %d", cmd, exitCode(err))
	}
	var srcs []string
	switch c := x.cmd.(type) {
	case *instructions.CopyCommand:
		if c.From != "" {
			if x.vertex == "" || x.fault == "" { // it is the image that is not to be had
				return fmt.Sprintf("invalid from flag value %s: %s", c.From, msg)
			}
			return msg
		}
		srcs = c.SourcePaths
	case *instructions.AddCommand:
		srcs = c.SourcePaths
	}
	for _, s := range srcs {
		if strings.ContainsAny(s, "*?[$:") || t.tree == nil {
			continue
		}
		if rel := strings.TrimPrefix(path.Clean("/"+s), "/"); rel != "" && !t.tree.Has(rel) {
			name, _, _ := strings.Cut(x.text, " ")
			return fmt.Sprintf("%s failed: file not found in build context or excluded by .dockerignore: stat %s: file does not exist", strings.ToUpper(name), rel)
		}
	}
	return msg
}

// culprit is the step that an error is about.
func (t *teller) culprit(err error) *step {
	var v *errdefs.VertexError
	if errors.As(err, &v) {
		if x := t.by[digest.Digest(v.Digest)]; x != nil {
			return x
		}
	}
	for _, src := range errdefs.Sources(err) {
		for _, r := range src.Ranges {
			for _, x := range t.script.steps {
				if line := int(r.GetStart().GetLine()); line > 0 && x.lines[0] <= line && line <= x.lines[1] {
					return x
				}
			}
		}
	}
	return t.by[t.bad]
}
