package native

import (
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/plan"
	contract "github.com/cloudos-io/cloudos/internal/runtime"
	"github.com/cloudos-io/cloudos/internal/runtime/cgroup"
	"github.com/cloudos-io/cloudos/internal/runtime/source"
	"golang.org/x/sys/unix"
)

// slotSources are the descriptors that slots may stand for, -1 where absent.
type slotSources struct {
	root  int
	stdio [3]int
	pidfd int
	tasks []int // cgroup v1, in the order of controllers
}

// planOptions are the parts of plan.Options that depend on the host alone.
func (d *Driver) planOptions(id string) plan.Options {
	o := plan.Options{ID: id, CgroupV2: d.cg.Mode != cgroup.V1, V1Controllers: d.controllers, AppArmor: d.limits.appArmor, SELinux: d.limits.seLinux, BindDevices: d.limits.userNS,
		KeepGroups: d.limits.keepGroups}
	return o
}

// openSlots supplies the descriptors that a plan asks for, in order; done
// closes those that were opened for it.
func (s *sandbox) openSlots(p *plan.Plan, src slotSources) (fds []int, done func(), err error) {
	if src.tasks == nil {
		src.tasks = s.tasks
	}
	return s.d.openSlots(p, src)
}

func (d *Driver) openSlots(p *plan.Plan, src slotSources) (fds []int, done func(), err error) {
	var opened []int
	done = func() {
		for _, fd := range opened {
			unix.Close(fd)
		}
	}
	fds = make([]int, 0, len(p.Slots))
	for i := range p.Slots {
		sl := &p.Slots[i]
		fd := -1
		switch sl.Kind {
		case plan.SlotRoot:
			fd = src.root
			if err = source.SetAttr(fd, sl); err != nil {
				return nil, done, &contract.StartError{Step: "prepare the root file system", Err: err}
			}
		case plan.SlotStdio:
			fd = src.stdio[map[string]int{"stdin": 0, "stdout": 1, "stderr": 2}[sl.Source]]
		case plan.SlotPidfd:
			fd = src.pidfd
		case plan.SlotCgroup:
			for k, c := range d.controllers {
				if c == sl.Source && k < len(src.tasks) {
					fd = src.tasks[k]
				}
			}
		case plan.SlotNamespace:
			if fd, err = source.Namespace(sl.Source); err != nil {
				return nil, done, err
			}
			opened = append(opened, fd)
		case plan.SlotMount, plan.SlotDevice:
			if fd, err = source.Mount(sl, d.exe.Path()); err != nil {
				return nil, done, err
			}
			opened = append(opened, fd)
		}
		if fd < 0 {
			return nil, done, fault.New(fault.Internal, "cannot supply descriptor %d (%s) of the plan", i, sl.Source)
		}
		fds = append(fds, fd)
	}
	return fds, done, nil
}
