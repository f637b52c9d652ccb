// Package display shows what a Compose command does: the progress of its steps
// (on a terminal, as plain lines or as JSON) and the output of containers behind
// coloured names. Everything is safe for concurrent use.
package display

import (
	"encoding/json"
	"fmt"
	"io"
	"sync"
)

// State of an event.
type State int

// States.
const (
	Working State = iota
	Done
	Warning
	Failed
)

// Event says how far something is.
type Event struct {
	// ID is what it is about ("Container web-1"); Parent groups layers under the
	// image they belong to.
	ID, Parent string
	Text       string
	Status     string
	State      State
	// Current and Total are bytes.
	Current, Total int64
}

// Progress shows events.
type Progress interface {
	Event(Event)
	// Print shows lines that are no event, such as a build's output.
	Print(line string)
	// Close leaves the last state on the screen.
	Close()
}

// Mode is how progress is shown.
type Mode string

// Modes.
const (
	Auto  Mode = "auto"
	TTY   Mode = "tty"
	Plain Mode = "plain"
	JSON  Mode = "json"
	Quiet Mode = "quiet"
)

// Modes lists them for flags.
var modes = []Mode{Auto, TTY, Plain, JSON, Quiet}

// ParseMode reads the value of --progress; "rawjson" is what builders call JSON.
func ParseMode(s string) (Mode, error) {
	if s == "" {
		return Auto, nil
	}
	if s == "none" {
		return Quiet, nil
	}
	for _, m := range modes {
		if s == string(m) {
			return m, nil
		}
	}
	return "", fmt.Errorf("unsupported --progress value %q: use auto, tty, plain, json or quiet", s)
}

// Options of New.
type Options struct {
	Mode   Mode
	DryRun bool
	Color  bool
	// Size gives the terminal's; nil means that w is none.
	Size func() (width, height int)
	// Lines is where Print goes; nil means w.
	Lines io.Writer
	// Title is the word in the head of a terminal's list: "Running".
	Title string
}

// New shows progress on w.
func New(w io.Writer, o Options) Progress {
	switch m := o.Mode; {
	case m == Quiet:
		return quiet{}
	case m == JSON:
		return &jsonLines{w: w, dry: o.DryRun}
	case m == Plain || m == Auto && o.Size == nil:
		return &plain{w: w, lines: o.Lines, dry: o.DryRun}
	case o.Size == nil:
		o.Size = func() (int, int) { return 80, 24 }
	}
	return newScreen(w, o)
}

type quiet struct{}

func (quiet) Event(Event)  {}
func (quiet) Print(string) {}
func (quiet) Close()       {}

// dryRun marks lines of what would be done.
const dryRun = "DRY-RUN MODE - "

type plain struct {
	mu       sync.Mutex
	w, lines io.Writer
	dry      bool
}

func (p *plain) Event(e Event) {
	if e.Parent != "" && e.State == Working && e.Total > 0 {
		return // bytes of a layer: noise without a screen
	}
	prefix := ""
	if p.dry {
		prefix = dryRun
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	fmt.Fprintln(p.w, prefix, clean(e.ID), clean(e.Text), clean(e.Status))
}

func (p *plain) Print(line string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.lines != nil {
		fmt.Fprintln(p.lines, line)
		return
	}
	fmt.Fprintln(p.w, line)
}

func (*plain) Close() {}

type jsonLines struct {
	mu  sync.Mutex
	w   io.Writer
	dry bool
}

type jsonEvent struct {
	DryRun   bool   `json:"dry-run,omitempty"`
	Tail     bool   `json:"tail,omitempty"`
	ID       string `json:"id,omitempty"`
	ParentID string `json:"parent_id,omitempty"`
	Text     string `json:"text,omitempty"`
	Status   string `json:"status,omitempty"`
	Current  int64  `json:"current,omitempty"`
	Total    int64  `json:"total,omitempty"`
	Percent  int64  `json:"percent,omitempty"`
	Error    bool   `json:"error,omitempty"`
}

func (j *jsonLines) put(e jsonEvent) {
	e.DryRun = j.dry
	b, err := json.Marshal(e)
	if err != nil {
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.w.Write(append(b, '\n'))
}

func (j *jsonLines) Event(e Event) {
	v := jsonEvent{ID: e.ID, ParentID: e.Parent, Text: e.Text, Status: e.Status, Current: e.Current, Total: e.Total, Error: e.State == Failed}
	if e.Total > 0 {
		v.Percent = e.Current * 100 / e.Total
	}
	j.put(v)
}

func (j *jsonLines) Print(line string) { j.put(jsonEvent{Tail: true, Text: line}) }
func (*jsonLines) Close()              {}
