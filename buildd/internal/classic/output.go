package classic

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"sync"

	"github.com/moby/buildkit/client"
	"github.com/opencontainers/go-digest"
)

// output is the stream of JSON lines.
type output struct {
	mu    sync.Mutex
	w     http.ResponseWriter
	rc    *http.ResponseController
	began bool
}

func newOutput(w http.ResponseWriter) *output {
	return &output{w: w, rc: http.NewResponseController(w)}
}

func (o *output) line(v any) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.began {
		o.w.Header().Set("Content-Type", "application/json")
		o.began = true
	}
	enc := json.NewEncoder(o.w)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(v)
	_ = o.rc.Flush()
}

func (o *output) stream(s string) { o.line(map[string]string{"stream": s}) }

func (o *output) aux(id string, v any) {
	m := map[string]any{"aux": v}
	if id != "" {
		m["id"] = id
	}
	o.line(m)
}

// fail ends the stream with an error; text says it in better words than its own.
func (o *output) fail(err error, text string) {
	msg := text
	if msg == "" {
		msg = err.Error()
	}
	if errors.Is(err, context.Canceled) {
		msg = "build cancelled"
	}
	o.line(map[string]any{"errorDetail": map[string]any{"code": exitCode(err), "message": msg}, "error": msg})
}

// commandOf is a RUN instruction's command as the classic builder named it.
func commandOf(run string) string {
	for strings.HasPrefix(run, "--") { // flags
		_, rest, ok := strings.Cut(run, " ")
		if !ok {
			break
		}
		run = strings.TrimLeft(rest, " ")
	}
	var words []string
	if json.Unmarshal([]byte(run), &words) == nil {
		return strings.Join(words, " ")
	}
	return "/bin/sh -c " + run
}

// narrator tells of a build whose Dockerfile is not known here, by BuildKit's own
// names of the steps.
type narrator struct {
	out   *output
	quiet bool
	told  map[digest.Digest]*told
	// failed is the instruction that ended with an error, "" if none did.
	failed string
}

type told struct {
	started, done bool
	step          bool
}

// stepName is how the Dockerfile frontend names a vertex: "[stage 2/5] RUN true".
var stepName = regexp.MustCompile(`^\[(?:(?:[^\]]* )?(\d+)/(\d+))\] (.*)$`)

func (n *narrator) tell(s *client.SolveStatus) {
	if n.told == nil {
		n.told = map[digest.Digest]*told{}
	}
	for _, v := range s.Vertexes {
		t := n.told[v.Digest]
		if t == nil {
			t = &told{}
			n.told[v.Digest] = t
		}
		m := stepName.FindStringSubmatch(v.Name)
		if v.Started != nil && !t.started {
			t.started = true
			if m != nil {
				t.step = true
				n.say(fmt.Sprintf("Step %s/%s : %s\n", m[1], m[2], m[3]))
			}
		}
		if v.Completed != nil && !t.done {
			t.done = true
			if m != nil && v.Error != "" && n.failed == "" {
				n.failed = m[3]
			}
			if t.step && v.Error == "" {
				if v.Cached {
					n.say(" ---> Using cache\n")
				}
				n.say(" ---> " + short(v.Digest.String()) + "\n")
			}
		}
	}
	for _, l := range s.Logs {
		n.say(string(l.Data))
	}
	for _, w := range s.Warnings {
		n.say("[Warning] " + string(w.Short) + "\n")
	}
}

func (n *narrator) end(string, bool) {}

func (n *narrator) explain(err error) string {
	if cmd, ok := strings.CutPrefix(n.failed, "RUN "); ok && isExit(err) {
		return fmt.Sprintf("The command '%s' returned a non-zero code: %d", commandOf(cmd), exitCode(err))
	}
	return strings.TrimPrefix(err.Error(), "failed to solve: ")
}

func (n *narrator) say(s string) {
	if !n.quiet && s != "" {
		n.out.stream(s)
	}
}

// short is a digest as people are shown it.
func short(d string) string {
	_, hex, ok := strings.Cut(d, ":")
	if !ok {
		hex = d
	}
	return hex[:min(12, len(hex))]
}
