package engine

import (
	"context"

	mcontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/oci"
)

// ContainerRename gives a container another name.
func (e *Engine) ContainerRename(ctx context.Context, name, newName string) error {
	u, err := e.lookup(name)
	if err != nil {
		return err
	}
	newName, err = container.CheckName(newName)
	if err != nil {
		return err
	}
	if err := u.acquire(ctx); err != nil {
		return err
	}
	defer u.release()
	old := u.rec.Load().Name
	if old == newName {
		return fault.New(fault.Invalid, "Renaming a container with the same name as its current name")
	}
	if err := e.names.Reserve(newName, u.id); err != nil {
		return err
	}
	r, p, err := e.change(u, func(n *container.Record) { n.Name = newName })
	if err == nil {
		err = p.Wait()
	}
	if err != nil {
		_, p, _ := e.change(u, func(n *container.Record) { n.Name = old })
		e.saved(u, p, nil)
		e.names.Release(newName, u.id)
		return err
	}
	e.names.Release(old, u.id)
	if r.State.Running() {
		if err := e.cfg.Networks.Rename(ctx, u.id, newName); err != nil && !fault.Is(err, fault.NotFound) {
			e.log.Warn("cannot rename a container in DNS", "container", u.id, "cause", err)
		}
	}
	e.publish(u, events.ActionRename, map[string]string{"oldName": "/" + old})
	return nil
}

// ContainerUpdate changes limits and the restart policy, of a running container
// too.
func (e *Engine) ContainerUpdate(ctx context.Context, name string, req mcontainer.UpdateConfig) (mcontainer.UpdateResponse, error) {
	var out mcontainer.UpdateResponse
	u, err := e.lookup(name)
	if err != nil {
		return out, err
	}
	if out.Warnings, err = oci.ValidateResources(&req.Resources, e.cfg.Host, true); err != nil {
		return out, err
	}
	if err := mcontainer.ValidateRestartPolicy(req.RestartPolicy); err != nil {
		return out, fault.As(fault.Invalid, err)
	}
	if err := u.acquire(ctx); err != nil {
		return out, err
	}
	defer u.release()
	r := u.rec.Load()
	switch r.State.Status {
	case mcontainer.StateRemoving, mcontainer.StateDead:
		return out, fault.New(fault.Conflict, "cannot update container %s: it is marked for removal and cannot be updated", u.id)
	}
	if r.HostConfig.AutoRemove && !req.RestartPolicy.IsNone() {
		return out, fault.New(fault.Conflict, "cannot update container %s: Restart policy cannot be updated because AutoRemove is enabled for the container", u.id)
	}
	hc := *r.HostConfig
	if err := mergeResources(&hc.Resources, &req.Resources); err != nil {
		return out, err
	}
	if req.RestartPolicy.Name != "" {
		hc.RestartPolicy = req.RestartPolicy
	}
	if e.policed() {
		if err := e.mayLimit(ctx, r, &hc); err != nil {
			return out, err
		}
	}
	if t := u.running(); t != nil {
		res, err := oci.Resources(&hc.Resources, oci.DevicesAt)
		if err != nil {
			return out, err
		}
		if err := t.Update(ctx, res); err != nil {
			return out, fault.New(fault.Of(err), "cannot update container %s: %w", u.id, err)
		}
	}
	_, p, err := e.change(u, func(n *container.Record) { n.HostConfig = &hc })
	if err == nil {
		err = p.Wait()
	}
	e.publish(u, events.ActionUpdate, nil)
	return out, err
}

// mergeResources takes over what an update sets; zero leaves a limit alone.
func mergeResources(have, want *mcontainer.Resources) error {
	if want.NanoCPUs > 0 && (have.CPUPeriod > 0 || have.CPUQuota > 0) {
		return fault.New(fault.Conflict, "Conflicting options: Nano CPUs cannot be updated as CPU Period or CPU Quota has already been set")
	}
	set := func(to *int64, v int64) {
		if v != 0 {
			*to = v
		}
	}
	if want.NanoCPUs != 0 {
		have.NanoCPUs, have.CPUPeriod, have.CPUQuota = want.NanoCPUs, 0, 0
	}
	if (want.CPUPeriod != 0 || want.CPUQuota != 0) && have.NanoCPUs > 0 && want.NanoCPUs == 0 {
		what := "CPU Period"
		if want.CPUQuota != 0 {
			what = "CPU Quota"
		}
		return fault.New(fault.Conflict, "Conflicting options: %s cannot be updated as NanoCPUs has already been set", what)
	}
	set(&have.CPUShares, want.CPUShares)
	set(&have.CPUPeriod, want.CPUPeriod)
	set(&have.CPUQuota, want.CPUQuota)
	set(&have.CPURealtimePeriod, want.CPURealtimePeriod)
	set(&have.CPURealtimeRuntime, want.CPURealtimeRuntime)
	set(&have.MemoryReservation, want.MemoryReservation)
	if want.Memory != 0 {
		if want.MemorySwap == 0 && have.MemorySwap > 0 && want.Memory > have.MemorySwap {
			return fault.New(fault.Invalid, "Memory limit should be smaller than already set memoryswap limit, update the memoryswap at the same time")
		}
		have.Memory = want.Memory
	}
	set(&have.MemorySwap, want.MemorySwap)
	if want.BlkioWeight != 0 {
		have.BlkioWeight = want.BlkioWeight
	}
	if want.CpusetCpus != "" {
		have.CpusetCpus = want.CpusetCpus
	}
	if want.CpusetMems != "" {
		have.CpusetMems = want.CpusetMems
	}
	if want.PidsLimit != nil {
		have.PidsLimit = want.PidsLimit
	}
	if len(want.BlkioWeightDevice) > 0 {
		have.BlkioWeightDevice = want.BlkioWeightDevice
	}
	if len(want.BlkioDeviceReadBps) > 0 {
		have.BlkioDeviceReadBps = want.BlkioDeviceReadBps
	}
	if len(want.BlkioDeviceWriteBps) > 0 {
		have.BlkioDeviceWriteBps = want.BlkioDeviceWriteBps
	}
	if len(want.BlkioDeviceReadIOps) > 0 {
		have.BlkioDeviceReadIOps = want.BlkioDeviceReadIOps
	}
	if len(want.BlkioDeviceWriteIOps) > 0 {
		have.BlkioDeviceWriteIOps = want.BlkioDeviceWriteIOps
	}
	return nil
}
