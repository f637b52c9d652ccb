package engine

import (
	"context"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/oci"
	"github.com/cloudos-io/cloudos/internal/runtime"
)

// labels are a container's SELinux labels, "" where SELinux is off.
type labels struct{ process, mount string }

// allotLabels decides on the labels of a container that is to be started: those
// asked for, those of whom it shares namespaces or a pod with, or categories of its
// own. A start that fails gives them back.
func (e *Engine) allotLabels(r *container.Record, back *scope) (l labels, err error) {
	if !e.cfg.Host.SELinux {
		return l, nil
	}
	hc := r.HostConfig
	o, err := oci.ParseSecurityOpt(hc.SecurityOpt)
	if err != nil {
		return l, err
	}
	if len(o.Labels) == 0 {
		switch with := e.labelledWith(r); {
		case hc.Privileged || hc.PidMode.IsHost() || hc.IpcMode.IsHost():
			o.Labels = []string{"disable"}
		case with != "":
			if o.Labels, err = oci.SameLabels(with); err != nil {
				return l, err
			}
		}
	}
	if l.process, l.mount, err = oci.Labels(o, hc.Privileged); err == nil {
		back.add(func(context.Context) { oci.ReleaseLabel(l.process) })
	}
	return l, err
}

// labelledWith is the label of a running container that r must be able to work with.
func (e *Engine) labelledWith(r *container.Record) string {
	var us []*unit
	for _, m := range []interface {
		IsContainer() bool
		Container() string
	}{r.HostConfig.IpcMode, r.HostConfig.PidMode} {
		if m.IsContainer() {
			if u, err := e.lookup(m.Container()); err == nil {
				us = append(us, u)
			}
		}
	}
	if r.Pod != nil {
		us = append(us, e.members(r.Pod.Pod)...)
	}
	for _, u := range us {
		if t := u.running(); t != nil && u.id != r.ID {
			if l := e.labelOf(t); l != "" {
				return l
			}
		}
	}
	return ""
}

// labelOf is what a running container has.
func (e *Engine) labelOf(t runtime.Task) string {
	if !e.cfg.Host.SELinux {
		return ""
	}
	return oci.LabelOf(t.Pid())
}
