package criapi

import (
	"context"
	"encoding/json"
	"slices"

	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Version implements the CRI.
func (s *Server) Version(_ context.Context, _ *v1.VersionRequest) (*v1.VersionResponse, error) {
	return &v1.VersionResponse{Version: "0.1.0", RuntimeName: "servin", RuntimeVersion: s.cfg.Version, RuntimeApiVersion: "v1"}, nil
}

// Status implements the CRI.
func (s *Server) Status(ctx context.Context, req *v1.StatusRequest) (*v1.StatusResponse, error) {
	info, err := s.cfg.Engine.PodNetworkStatus(ctx)
	network := &v1.RuntimeCondition{Type: v1.NetworkReady, Status: true}
	if err != nil {
		network = &v1.RuntimeCondition{Type: v1.NetworkReady, Reason: "NetworkPluginNotReady", Message: err.Error()}
	}
	resp := &v1.StatusResponse{
		Status:   &v1.RuntimeStatus{Conditions: []*v1.RuntimeCondition{{Type: v1.RuntimeReady, Status: true}, network}},
		Features: &v1.RuntimeFeatures{SupplementalGroupsPolicy: true},
	}
	h := s.cfg.Engine.PodHost()
	resp.Features.UserNamespacesHostNetwork = h.UserNamespaces
	slices.Sort(h.Runtimes)
	for _, name := range append([]string{""}, h.Runtimes...) {
		f := &v1.RuntimeHandlerFeatures{}
		if name == "" || name == "servin" { // of others this is not known
			f.RecursiveReadOnlyMounts, f.UserNamespaces = h.RecursiveReadonly, h.UserNamespaces
		}
		resp.RuntimeHandlers = append(resp.RuntimeHandlers, &v1.RuntimeHandler{Name: name, Features: f})
	}
	if req.GetVerbose() {
		conf, err := json.Marshal(map[string]any{
			"containerdRootDir": h.Root, // where clients look whether ids of mounts can be mapped
			"rootDir":           h.Root, "systemdCgroup": h.SystemdCgroups, "cgroupV2": h.CgroupV2, "runtimes": h.Runtimes, "version": s.cfg.Version,
		})
		if err != nil {
			return nil, err
		}
		net, err := json.Marshal(info)
		if err != nil {
			return nil, err
		}
		resp.Info = map[string]string{"config": string(conf), "network": string(net)}
	}
	return resp, nil
}

// UpdateRuntimeConfig implements the CRI.
func (s *Server) UpdateRuntimeConfig(ctx context.Context, req *v1.UpdateRuntimeConfigRequest) (*v1.UpdateRuntimeConfigResponse, error) {
	if cidr := req.GetRuntimeConfig().GetNetworkConfig().GetPodCidr(); cidr != "" {
		if err := s.cfg.Engine.PodNetworkConfigure(ctx, cidr); err != nil {
			return nil, err
		}
	}
	return &v1.UpdateRuntimeConfigResponse{}, nil
}

// RuntimeConfig implements the CRI.
func (s *Server) RuntimeConfig(context.Context, *v1.RuntimeConfigRequest) (*v1.RuntimeConfigResponse, error) {
	d := v1.CgroupDriver_CGROUPFS
	if s.cfg.Engine.PodHost().SystemdCgroups {
		d = v1.CgroupDriver_SYSTEMD
	}
	return &v1.RuntimeConfigResponse{Linux: &v1.LinuxRuntimeConfiguration{CgroupDriver: d}}, nil
}
