package classic

import (
	"encoding/json"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/moby/buildkit/client"
	"github.com/opencontainers/go-digest"
)

// say is a status: a name, what became of it, what it wrote.
func say(name, state, wrote string) *client.SolveStatus {
	now := time.Now()
	v := &client.Vertex{Digest: digest.FromString(name), Name: name}
	switch state {
	case "began":
		v.Started = &now
	case "done":
		v.Started, v.Completed = &now, &now
	case "cached":
		v.Started, v.Completed, v.Cached = &now, &now, true
	}
	s := &client.SolveStatus{Vertexes: []*client.Vertex{v}}
	if wrote != "" {
		s.Logs = []*client.VertexLog{{Vertex: v.Digest, Data: []byte(wrote), Stream: 1}}
	}
	return s
}

var regexpID = regexp.MustCompile(` [0-9a-f]{12}\n`)

// toldOf runs a build and returns what is told of it, with the ids of vertices as their names.
func toldOf(t *testing.T, dockerfile string, o *options, known bool, sts ...*client.SolveStatus) string {
	t.Helper()
	if o == nil {
		o = &options{}
	}
	sc, err := readScript("Dockerfile", []byte(dockerfile), o)
	if err != nil {
		t.Fatal(err)
	}
	rec := httptest.NewRecorder()
	n := newTeller(newOutput(rec), false, sc, nil)
	for _, s := range sts {
		n.tell(s)
	}
	n.end("sha256:"+strings.Repeat("f", 64), known)
	var b strings.Builder
	dec := json.NewDecoder(rec.Body)
	for dec.More() {
		var l struct{ Stream string }
		if err := dec.Decode(&l); err != nil {
			t.Fatal(err)
		}
		b.WriteString(l.Stream)
	}
	out := b.String()
	for _, s := range sts {
		for _, v := range s.Vertexes {
			out = strings.ReplaceAll(out, short(v.Digest.String()), "<"+v.Name+">")
		}
	}
	return out
}

func TestTeller(t *testing.T) {
	got := toldOf(t, "ARG V=1\nFROM busybox:$V\nENV a=b\nRUN one \\\n  two\nCMD x\n", &options{args: []string{"V", "W", "http_proxy"}}, false,
		say("[internal] load build definition", "done", ""),
		say("[1/2] FROM docker.io/library/busybox:1", "done", ""),
		say("[2/2] RUN one   two", "began", ""),
		say("[2/2] RUN one   two", "began", "hello\n"),
		say("[2/2] RUN one   two", "done", ""))
	got = regexpID.ReplaceAllStringFunc(got, func(s string) string {
		if strings.Trim(s, " f\n") == "" {
			return s
		}
		return " ID\n"
	})
	want := `Step 1/5 : ARG V=1
Step 2/5 : FROM busybox:$V
 ---> <[1/2] FROM docker.io/library/busybox:1>
Step 3/5 : ENV a=b
 ---> ID
Step 4/5 : RUN one   two
 ---> Running in <[2/2] RUN one   two>
hello
 ---> Removed intermediate container <[2/2] RUN one   two>
 ---> <[2/2] RUN one   two>
Step 5/5 : CMD x
 ---> ffffffffffff
[Warning] One or more build-args [W] were not consumed
`
	if got != want {
		t.Errorf("told\n%s\nwant\n%s", got, want)
	}
}

// TestTellerOrders holds back what is not its turn, and says what comes from the cache.
func TestTellerOrders(t *testing.T) {
	got := toldOf(t, "FROM a AS one\nRUN x\nFROM b\nRUN y\nFROM c AS three\nRUN z\nCOPY --from=one /f /f\n", nil, false,
		say("[three 1/3] FROM c", "done", ""), say("[three 2/3] RUN z", "began", "z says\n"),
		say("[one 1/2] FROM a", "done", ""), say("[one 2/2] RUN x", "cached", ""),
		say("[three 2/3] RUN z", "done", ""), say("[three 3/3] COPY --from=one /f /f", "done", ""))
	if strings.Index(got, "Step 2/7 : RUN x") > strings.Index(got, "z says") || strings.Count(got, "Using cache") != 1 {
		t.Error("out of order: ", got)
	}
	for _, s := range []string{"Step 4/7 : RUN y\n ---> Skipped", "Step 7/7 : COPY --from=one /f /f\n ---> ffffffffffff\n"} {
		if !strings.Contains(got, s) {
			t.Errorf("%q is missing: %s", s, got)
		}
	}
	// Instructions that only change the configuration are known by what is around them.
	got = toldOf(t, "FROM a\nENV a=b\nRUN x\nCMD y\n", nil, true, say("[1/2] FROM a", "cached", ""), say("[2/2] RUN x", "cached", ""))
	if strings.Count(got, "Using cache") != 3 {
		t.Error(got)
	}
	got = toldOf(t, "FROM a\nRUN x\n", nil, false, say("[1/1] FROM a", "done", ""), say("[2/2] ONBUILD RUN t", "done", "trigger\n"), say("[3/3] RUN x", "done", "mine\n"))
	if !strings.Contains(got, "# Executing 1 build trigger\ntrigger\n") || strings.Index(got, "mine") < strings.Index(got, "Step 2/2 : RUN x") {
		t.Error(got)
	}
}

func TestScriptRefuses(t *testing.T) {
	for in, want := range map[string]string{
		"":                               "the Dockerfile (Dockerfile) cannot be empty",
		"FORM x\n":                       "dockerfile parse error on line 1: unknown instruction: FORM (did you mean FROM?)",
		"FROM a\nCOPY --from=3 a b":      "invalid from flag value 3: index out of bounds",
		"FROM a AS b\nCOPY --from=0 a b": "invalid from flag value 0: refers to current build stage",
		"FROM scratch AS x\n":            "No image was generated. Is your Dockerfile empty?",
	} {
		if _, err := readScript("Dockerfile", []byte(in), &options{}); err == nil || err.Error() != want {
			t.Errorf("%q: %v, want %s", in, err, want)
		}
	}
	if _, err := readScript("D", []byte("FROM a AS b\n"), &options{attrs: map[string]string{"target": "c"}}); err == nil || err.Error() != `target stage "c" could not be found` {
		t.Error(err)
	}
	if sc, err := readScript("D", []byte("# syntax=other/frontend\nWHATEVER\n"), &options{}); sc != nil || err != nil {
		t.Error(sc, err)
	}
}

func FuzzScript(f *testing.F) {
	f.Add("ARG A\nFROM $A AS b\nRUN --mount=type=bind,from=b x\nFROM b\nCOPY --from=0 a b\nSHELL [\"x\"]\nRUN y\n", "[b 2/2] RUN x", "x")
	f.Add("FROM scratch\nWORKDIR /\nCOPY --link a b\n", "[1/2] COPY a b", "")
	f.Fuzz(func(t *testing.T, dockerfile, vertex, target string) {
		sc, err := readScript("Dockerfile", []byte(dockerfile), &options{attrs: map[string]string{"target": target}, args: []string{"A"}})
		if err != nil || sc == nil {
			return
		}
		n := newTeller(newOutput(httptest.NewRecorder()), false, sc, nil)
		for _, state := range []string{"", "began", "done"} {
			n.tell(say(vertex, state, "log"))
		}
		n.end("sha256:0", true)
		if n.next != len(sc.steps) {
			t.Error("not all is told")
		}
	})
}
