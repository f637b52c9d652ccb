// Package plan decides what a Compose command has to do: a project and what was
// observed of the engine go in, a graph of steps comes out. It does nothing
// itself and speaks to nobody, so golden files hold its decisions. Package engine
// carries plans out.
//
// Every plan can be made and carried out again: what is as it should be yields no
// step that changes anything.
package plan

import (
	"fmt"
	"strings"

	"github.com/moby/moby/api/types/container"
)

// Kind says what a step does.
type Kind int

// Kinds of steps.
const (
	CreateNetwork Kind = iota
	// DetachNetwork takes a container off a network that is to be made anew,
	// AttachNetwork puts it on the new one.
	DetachNetwork
	AttachNetwork
	RemoveNetwork
	CreateVolume
	RemoveVolume
	RemoveImage
	// Keep is a container that runs as it should.
	Keep
	Create
	// Recreate makes a container that takes another's place.
	Recreate
	// Rename finishes a replacement that was cut off.
	Rename
	Start
	Stop
	Restart
	Kill
	Pause
	Unpause
	Remove
	// Wait waits for a condition of a service's containers.
	Wait
	// Barrier parts what makes containers from what starts them.
	Barrier
)

var kindNames = [...]string{"create network", "detach", "attach", "remove network", "create volume", "remove volume", "remove image", "keep", "create", "recreate",
	"rename", "start", "stop", "restart", "kill", "pause", "unpause", "remove", "wait", "barrier"}

func (k Kind) String() string { return kindNames[k] }

// Step is one thing to do, after others.
type Step struct {
	ID   int
	Kind Kind
	// After lists the steps that must have been done.
	After []int
	// Service and Number tell which container of a project is meant, Name its
	// name (or that of a network, volume or image).
	Service string
	Number  int
	Name    string
	// Key is the network's or volume's in the Compose file.
	Key string
	// Container is the id of one that exists: what is started, stopped, removed
	// or replaced. Steps that start what another step makes have none.
	Container string
	// Condition and Dependent are a wait's: what for, and who waits. Optional
	// lets the dependent start although it fails.
	Condition, Dependent string
	Optional             bool
	// Gentle, for Remove, stops the container first.
	Gentle bool
	// Why is for people.
	Why string
}

// Plan is a graph of steps; a step's After names steps before it in the list.
type Plan struct {
	Steps []Step
	// Orphans are containers of the project whose service is gone, where they
	// are not removed.
	Orphans  []string
	Warnings []string
}

func (p *Plan) add(s Step) int {
	s.ID = len(p.Steps)
	p.Steps = append(p.Steps, s)
	return s.ID
}

// Changes tells whether carrying the plan out would change anything.
func (p *Plan) Changes() bool {
	for _, s := range p.Steps {
		if s.Kind != Keep && s.Kind != Wait && s.Kind != Barrier {
			return true
		}
	}
	return false
}

// String is the form of the golden files.
func (p *Plan) String() string {
	var b strings.Builder
	for _, s := range p.Steps {
		fmt.Fprintf(&b, "%d %s %s", s.ID, s.Kind, s.Name)
		if s.Kind == Wait {
			fmt.Fprintf(&b, "%s to be %s for %s", s.Service, s.Condition, s.Dependent)
			if s.Optional {
				b.WriteString(" if it can")
			}
		}
		if s.Container != "" {
			fmt.Fprintf(&b, " (%s)", s.Container[:min(4, len(s.Container))])
		}
		if len(s.After) > 0 {
			fmt.Fprintf(&b, " after %s", strings.Trim(fmt.Sprint(s.After), "[]"))
		}
		if s.Why != "" {
			fmt.Fprintf(&b, ": %s", s.Why)
		}
		b.WriteByte('\n')
	}
	if len(p.Orphans) > 0 {
		fmt.Fprintf(&b, "orphans: %s\n", strings.Join(p.Orphans, " "))
	}
	for _, w := range p.Warnings {
		fmt.Fprintf(&b, "warning: %s\n", w)
	}
	return b.String()
}

// Object is a network or volume that was found.
type Object struct {
	ID     string
	Labels map[string]string
}

// Observed is what the engine has.
type Observed struct {
	// Containers of the project, one-offs too.
	Containers []container.Summary
	// Networks and Volumes by their keys in the Compose file.
	Networks, Volumes map[string]Object
	// Images gives ids by name.
	Images map[string]string
}

// Policy says when containers are made anew.
type Policy int

// Policies.
const (
	Diverged Policy = iota
	Force
	Never
)
